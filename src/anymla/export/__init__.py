"""Converted checkpoints in the formats of serving engines."""

"""Checkpoint folders and devices."""

"""Calibration text to second moments, one layer at a time."""

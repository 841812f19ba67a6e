"""Runs a decoder layer by layer."""

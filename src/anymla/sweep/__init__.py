"""Runs a method over a checkpoint: streams, resume, shards."""

"""Quality, cache size, and text of a model."""

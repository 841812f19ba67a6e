"""The converted model as transformers runs it."""

"""Tensors in, tensors out: a layer, then a model, then a checkpoint."""

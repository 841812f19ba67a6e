"""Layers that use the attention map of an earlier layer: spans, weights, alignment of heads."""

from anymla.methods.shared_attention.settings import ShareAttention

__all__ = ["ShareAttention"]

"""A layer at full budget, to check that it was understood, and to look at weights that every family has alike."""

from __future__ import annotations

import torch

from anymla.architectures.attention import AttentionWeights
from anymla.methods.mla.channels import per_head_channels
from anymla.methods.mla.latent import Latent
from anymla.methods.mla.weights import ConvertedLayer


def whole_layer(weights: AttentionWeights) -> ConvertedLayer:
    """All channels and a latent of full rank: the original itself, without any statistics."""
    kv_heads, d, _ = weights.key.shape
    pairs, device = weights.rope_pairs, weights.key.device
    left = torch.arange(d, device=device) >= 2 * pairs  # dims of a key that no channel carries
    kept = torch.cat([left.repeat(kv_heads), torch.ones(kv_heads * d, dtype=torch.bool, device=device)])
    encoder = torch.eye(2 * kv_heads * d, dtype=torch.float64, device=device)[kept]
    rotation = torch.ones(len(weights.query), pairs, dtype=torch.complex128, device=device)
    return ConvertedLayer(
        channels=per_head_channels(torch.arange(pairs, device=device).expand(kv_heads, -1), pairs),
        latent=Latent(encoder, encoder.T, torch.zeros_like(encoder[0])),
        rotation=rotation,
    )

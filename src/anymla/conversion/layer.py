"""One layer from grouped-query to latent attention: tensors in, tensors out (docs/mathematics.md).

Shapes: D hidden, H query heads, G kv heads, n = H/G, d head_dim, P = d/2 rope pairs, K channels, R = 2K, r latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.attention import AttentionWeights
from anymla.calibration.moments import Moments
from anymla.factorization import Factorization, Latent, LatentProblem
from anymla.modeling.modeling_anymla import LatentAttention
from anymla.rope import Channels, RopeChoice


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """Channels, latent and expected rotation of one layer; all that its new weights are made of."""

    channels: Channels
    latent: Latent
    rotation: Tensor  # [H,P] complex: what stands in for e^{i Delta theta} on the position-free part


def convert_layer(
    weights: AttentionWeights,
    moments: Moments,
    rope: RopeChoice,
    factorization: Factorization,
    *,
    rope_dims: int,
    kv_rank: int,
    expected_rotation: bool,
) -> ConvertedLayer:
    """Chooses channels, then the latent of what they leave; float64 throughout."""
    channels = rope(moments, rope_dims, expected_rotation=expected_rotation)
    rotation = moments.rotation if expected_rotation else torch.ones_like(moments.rotation)
    rotation = rotation * moments.rope_scale
    latent = factorization(LatentProblem(weights, moments, channels, rotation), kv_rank)
    return ConvertedLayer(channels=channels, latent=latent, rotation=rotation)


def latent_tensors(weights: AttentionWeights, layer: ConvertedLayer) -> dict[str, Tensor]:
    """The tensors of LatentAttention that conversion makes, float64; those it does not name stay the original's."""
    kv_heads, d, hidden = weights.key.shape
    size, device = kv_heads * d, weights.key.device
    channels, latent = layer.channels, layer.latent
    encoder = latent.encoder.clone()  # from y to the latent; now from the true [k ; v]
    encoder[:, :size] = latent.encoder[:, :size] @ channels.remainder(d // 2)
    offset = latent.encoder @ latent.mean
    key_rows = torch.cat([encoder[:, :size], channels.encoder(d // 2)])  # [r+R, Gd]
    value_rows = encoder[:, size:] @ weights.value.reshape(size, hidden)
    value_bias = encoder[:, size:] @ weights.value_bias.flatten() - offset
    rank = encoder.shape[0]
    if weights.key_norm:
        tensors = {"k_a_proj_with_mqa.weight": key_rows, "v_a_proj.weight": value_rows, "v_a_proj.bias": value_bias}
    else:
        weight, bias = key_rows @ weights.key.reshape(size, hidden), key_rows @ weights.key_bias.flatten()
        weight[:rank] += value_rows
        bias[:rank] += value_bias
        tensors = {"kv_a_proj_with_mqa.weight": weight, "kv_a_proj_with_mqa.bias": bias}
    heads = weights.query.shape[0]
    value_mean = latent.mean[size:].view(kv_heads, d).repeat_interleave(heads // kv_heads, dim=0)
    decoder = latent.decoder.view(2, kv_heads, d, rank).transpose(0, 1)  # per kv head: key rows, then value rows
    weight = channels.decode.conj().T  # [G,K]
    return tensors | {
        "kv_b_proj.weight": decoder.reshape(2 * size, rank),
        "o_proj.weight": weights.output.flatten(1),
        "o_proj.bias": weights.output_bias + torch.einsum("Dhd,hd->D", weights.output, value_mean),
        "query_rotation": torch.stack([layer.rotation.real, layer.rotation.imag]),
        "channel_weight": torch.stack([weight.real, weight.imag]),
        "channel_index": channels.index.to(device),
    }


def build_attention(original: Any, tensors: dict[str, Tensor], *, kv_rank: int, rope_dims: int) -> LatentAttention:
    """A LatentAttention in the original's dtype and device that holds ``tensors``; float64 is cast here, once."""
    like = original.q_proj.weight
    with torch.device("meta"):
        attention = LatentAttention(original, kv_rank, rope_dims)
    cast = {
        name: (tensor.to(like.dtype) if tensor.is_floating_point() else tensor).to(like.device).contiguous()
        for name, tensor in tensors.items()
    }
    kept = {name: tensor for name, tensor in attention.state_dict().items() if name not in cast}
    attention.load_state_dict(cast | kept, assign=True)
    return attention.eval().requires_grad_(False)

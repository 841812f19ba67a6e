"""The gauge of the cache: maps of the latent and of rope channels that fold into the weights, chosen for a codec.

Whatever invertible map the encoder of the latent gets, the decoder undoes it, so the model is the same in exact
arithmetic, and what a quantised cache loses is not. A rope channel takes a factor only: nothing else commutes with its
rotation.

Shapes as in converted.py; r' >= r is the width of the latent as it is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anymla.exports.converted import Layer

ENCODERS = (  # whose rows make the latent, and in the first three rope channels behind it
    *("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "k_a_proj_with_mqa.weight"),
    *("v_a_proj.weight", "v_a_proj.bias"),
)


@dataclass(frozen=True)
class Gauge:
    """``encoder`` [r',r] and ``decoder`` [r,r'], whose product is 1; ``channels`` [K], a factor of each. Float64."""

    encoder: Tensor
    decoder: Tensor
    channels: Tensor


def regauged_layer(layer: Layer, gauge: Gauge) -> Layer:
    """The layer with the width of the latent as it is cached."""
    return replace(layer, latent=replace(layer.latent, kv_lora_rank=len(gauge.encoder)))


def regauged_tensors(tensors: Mapping[str, Tensor], gauge: Gauge) -> dict[str, Tensor]:
    """Tensors of LatentAttention, or some of them, in float64, with the gauge folded in."""
    rank, made = gauge.encoder.shape[1], dict(tensors)
    for name in made.keys() & set(ENCODERS):
        latent, rope = made[name][:rank], made[name][rank:].unflatten(0, (2, -1))
        factors = gauge.channels.view(-1, *[1] * (rope.dim() - 2))[: rope.shape[1]]  # v_a_proj has no channels
        made[name] = torch.cat([gauge.encoder @ latent, (rope * factors).flatten(0, 1)])
    if "kv_b_proj.weight" in made:
        made["kv_b_proj.weight"] = made["kv_b_proj.weight"] @ gauge.decoder
    if "channel_weight" in made:
        reads = made["channel_weight"]
        made["channel_weight"] = reads / gauge.channels.repeat(reads.shape[-1] // len(gauge.channels))
    return made

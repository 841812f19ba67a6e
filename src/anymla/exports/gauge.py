"""The gauge of the cache: maps of the latent and factors of rope channels, which fold into the weights exactly.

The encoder of the latent may get any invertible map, because the decoder undoes it. The model stays the same, but the
loss of a quantised cache changes. A rope channel takes only a factor: nothing else commutes with its rotation.
gauge_choice.py chooses them.

Shapes as in converted.py; r' >= r is the width of the latent as it is cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anymla.exports.converted import Converted, Layer

ENCODERS = (  # their rows make the latent, those of the first three rope channels too
    *("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "k_a_proj_with_mqa.weight"),
    *("v_a_proj.weight", "v_a_proj.bias"),
)


@dataclass(frozen=True)
class Gauge:
    """``encoder`` [r',r] and ``decoder`` [r,r'], whose product is 1; ``channels`` [K], a factor of each. Float64."""

    encoder: Tensor
    decoder: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Regauged(Converted):
    """A converted model whose layers, in their order, cache what ``gauges`` make of latent and rope key."""

    gauges: Sequence[Gauge]

    def tensors(self, layer: Layer, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """As those of a converted model, with the gauge folded in."""
        return folded(super().tensors(layer, names), self.gauges[layer.index])


def regauged(source: Converted, gauges: Sequence[Gauge]) -> Regauged:
    """Returns the same model with ``gauges``, one for each of its layers."""
    layers = tuple(
        replace(layer, latent=replace(layer.latent, kv_lora_rank=len(gauge.encoder)))
        for layer, gauge in zip(source.layers, gauges, strict=True)
    )
    return Regauged(**vars(source) | {"layers": layers}, gauges=gauges)


def folded(tensors: Mapping[str, Tensor], gauge: Gauge) -> dict[str, Tensor]:
    """Tensors of LatentAttention, or some of them, in float64, with the gauge folded in."""
    rank, made = gauge.encoder.shape[1], dict(tensors)
    for name in made.keys() & set(ENCODERS):
        latent, rope = made[name][:rank], made[name][rank:]
        if len(rope):
            factors = gauge.channels.repeat(2).view(-1, *[1] * (rope.dim() - 1))
            rope = rope * factors
        made[name] = torch.cat([gauge.encoder @ latent, rope])
    if "kv_b_proj.weight" in made:
        made["kv_b_proj.weight"] = made["kv_b_proj.weight"] @ gauge.decoder
    if "channel_weight" in made:
        reads = made["channel_weight"]  # [2,G,K fold]
        made["channel_weight"] = reads / gauge.channels.repeat(reads.shape[-1] // max(1, len(gauge.channels)))
    return made

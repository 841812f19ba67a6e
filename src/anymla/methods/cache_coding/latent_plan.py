"""What both vectors are coded with that a converted layer caches, under a budget. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from anymla.methods.cache_coding.allocation import allocate, coding, error, typical
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.spec import LayerSpec


class LatentCoding(BaseModel):
    """How one converted layer is coded: its latent and its rope key, or keys and values of low rank.

    ``key_bits``: of the latent's principal axes, or of keys; ``key_parts``: numbers of its parts, which stay apart.
    ``value_bits``: of values; where there are ``channels`` of a rope key, all their real parts, then all imaginary
    ones. ``predicted_kl``, ``facts``: as of plan.LayerCoding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    key_parts: tuple[int, ...]
    channels: bool
    predicted_kl: float
    facts: Any = Field(default=None, exclude=True, repr=False)

    @property
    def key_order(self) -> list[int]:
        """The axes, in each part the most bits first."""
        ends = [*accumulate(self.key_parts)]
        parts = (range(end - size, end) for size, end in zip(self.key_parts, ends, strict=True))
        return [place for part in parts for place in sorted(part, key=lambda place: -self.key_bits[place])]

    @property
    def value_order(self) -> list[int]:
        """The axes, or the parts of the channels, those with the most bits first."""
        if not self.channels:
            return sorted(range(len(self.value_bits)), key=lambda place: -self.value_bits[place])
        channels = len(self.value_bits) // 2
        parts = [(self.value_bits[place], self.value_bits[place + channels]) for place in range(channels)]
        order = sorted(range(channels), key=lambda place: (-max(parts[place]), *(-bits for bits in parts[place])))
        return [*order, *(place + channels for place in order)]

    def spec(self, first_tokens: int) -> CodedSpec:
        """The cache of a layer."""
        basis = "own" if self.channels else "axes"
        return CodedSpec(
            keys=coding(self.key_bits, self.key_order),
            values=coding(self.value_bits, self.value_order),
            key_basis=basis,
            value_basis=basis,
            first_tokens=first_tokens,
            rope_scale=1.0 if self.facts is None else self.facts["rope_scale"],
        )

    def told(self) -> dict[str, Any]:
        """What a report says of a layer."""
        names = ("latent", "rope_key") if self.channels else ("key", "value")
        sizes = dict(zip(names, (self.key_bits, self.value_bits), strict=True))
        kept = {f"{name}_coefficients": sum(map(bool, bits)) for name, bits in sizes.items()}
        means = {f"{name}_bits": sum(bits) / max(1, len(bits)) for name, bits in sizes.items()}
        return {**kept, **means, "predicted_kl": self.predicted_kl}


def plan_latents(
    layers: Sequence[LayerSpec], facts: Sequence[dict[str, Any] | None], budget: int, held: Sequence[int]
) -> list[LatentCoding]:
    """Bits for all layers from one ``budget`` of bytes; ``held``: tokens that each of their two rows is stored for."""
    energies = [_energies(*each) for each in zip(layers, facts, strict=True)]
    bits = allocate([row for pair in energies for row in pair], budget, held)
    return [
        LatentCoding(
            key_bits=tuple(keys),
            value_bits=tuple(values),
            key_parts=key_parts(layer),
            channels=has_channels(layer),
            predicted_kl=(error(pair[0], keys) + error(pair[1], values)) / 2,
            facts=fact,
        )
        for layer, pair, fact, keys, values in zip(layers, energies, facts, bits[::2], bits[1::2], strict=True)
    ]


def has_channels(layer: LayerSpec) -> bool:
    """Whether the second vector of a layer is a rope key, and not values."""
    return layer.latent is not None or layer.mfa is not None


def key_parts(layer: LayerSpec) -> tuple[int, ...]:
    """Numbers of the parts of the first vector: MFA's key and value stand beside each other."""
    size, _ = layer.coded_sizes
    values = 0 if layer.mfa is None else layer.mfa.value_rank
    return (size - values, values) if values else (size,)


def _energies(layer: LayerSpec, facts: dict[str, Any] | None) -> tuple[Sequence[float], Sequence[float]]:
    """Those of both vectors; of a layer that nobody looked at evenly falling ones."""
    if facts is not None:
        return facts["key_energies"]["row"], facts["value_energies"]["row"]
    _, values = layer.coded_sizes
    keys = [energy for part in key_parts(layer) for energy in typical(part)]
    return keys, typical(values // 2) * 2 if has_channels(layer) else typical(values)

"""What every layer's latent and rope key are coded with under a budget. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from anymla.methods.cache_coding.allocation import allocate, error
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import LayerSpec

FALL = 1e-4  # of the energies of a layer that nobody looked at, from its first coefficient to its last


class LatentCoding(BaseModel):
    """How one layer with a latent is coded.

    ``latent_bits``: of the latent's principal axes. ``rope_bits``: of the rope key, all real parts of its channels,
    then all imaginary ones. ``predicted_kl``, ``facts``: as of plan.LayerCoding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    latent_bits: tuple[int, ...]
    rope_bits: tuple[int, ...]
    predicted_kl: float
    facts: Any = Field(default=None, exclude=True, repr=False)

    @property
    def latent_order(self) -> list[int]:
        """The axes, the most bits first."""
        return sorted(range(len(self.latent_bits)), key=lambda place: -self.latent_bits[place])

    @property
    def rope_order(self) -> list[int]:
        """The parts of the channels, the channels with the most bits first."""
        channels = len(self.rope_bits) // 2
        parts = [(self.rope_bits[place], self.rope_bits[place + channels]) for place in range(channels)]
        order = sorted(range(channels), key=lambda place: (-max(parts[place]), *(-bits for bits in parts[place])))
        return [*order, *(place + channels for place in order)]

    def spec(self, first_tokens: int) -> CodedSpec:
        """The cache of a layer."""
        return CodedSpec(
            keys=_coding(self.latent_bits, self.latent_order),
            values=_coding(self.rope_bits, self.rope_order),
            key_basis="own",
            value_basis="own",
            first_tokens=first_tokens,
            rope_scale=1.0 if self.facts is None else self.facts["rope_scale"],
        )

    def told(self) -> dict[str, Any]:
        """What a report says of a layer."""
        sizes = {"latent": self.latent_bits, "rope_key": self.rope_bits}
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
            latent_bits=tuple(latent),
            rope_bits=tuple(rope),
            predicted_kl=(error(pair[0], latent) + error(pair[1], rope)) / 2,
            facts=fact,
        )
        for pair, fact, latent, rope in zip(energies, facts, bits[::2], bits[1::2], strict=True)
    ]


def _energies(layer: LayerSpec, facts: dict[str, Any] | None) -> tuple[Sequence[float], Sequence[float]]:
    """Those of latent and rope key; of a layer that nobody looked at evenly falling ones."""
    if facts is not None:
        return facts["key_energies"]["latent"], facts["value_energies"]["rope_key"]
    rank, rope_dims = layer.coded_sizes
    return _falling(rank), _falling(rope_dims // 2) * 2


def _falling(width: int) -> list[float]:
    return [FALL ** (place / width) for place in range(width)]


def _coding(bits: Sequence[int], order: Sequence[int]) -> Coding:
    if not bits:  # the rope key of a family without rope
        return Coding(bits=((16, 0),), kind="plain")
    return Coding(bits=tuple((width, len(list(run))) for width, run in groupby(bits[place] for place in order)))

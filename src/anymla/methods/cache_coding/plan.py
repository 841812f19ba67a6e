"""What every layer's cache is coded with under a budget: the basis of keys, and bits. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from anymla.errors import InfeasibleError
from anymla.methods.cache_coding.allocation import allocate, error
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import AttentionSpec, LatentSpec

if TYPE_CHECKING:
    from anymla.methods.cache_coding.transform_coding import TransformCoding

FALL = 1e-4  # of the energies of a layer that nobody looked at, from its first coefficient to its last


class LayerCoding(BaseModel):
    """How one layer is coded. A latent is one of keys, in the basis "own", its rope key one of values.

    ``key_bits``, ``value_bits``: of every coefficient, in the basis's own order (basis.py). ``predicted_kl``: nats per
    token that it costs, after small and independent errors. ``facts``: what the survey says of the layer; None before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    key_basis: str
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    predicted_kl: float
    facts: Any = Field(default=None, exclude=True, repr=False)

    def spec(self, attention: AttentionSpec, first_tokens: int, exact_window: int) -> CodedSpec:
        """The cache of a layer."""
        return CodedSpec(
            keys=_coding(self.key_bits, self.channels(attention)),
            values=_coding(self.value_bits, len(self.value_bits) // 2 if self.is_latent else 0),
            key_basis=self.key_basis,
            value_basis="own" if self.is_latent else "axes",
            first_tokens=first_tokens,
            exact_window=layer_window(attention, exact_window),
            rope_scale=1.0 if self.facts is None else self.facts["rope_scale"],
        )

    @property
    def is_latent(self) -> bool:
        """Whether it is a latent that is coded."""
        return self.key_basis == "own"

    def channels(self, attention: AttentionSpec) -> int:
        """How many rope channels the keys' coefficients begin with."""
        return attention.num_kv_heads * attention.rope_pairs if self.key_basis == "channels" else 0


@dataclass(frozen=True, kw_only=True)
class Energies:
    """What the coefficients of a layer carry: of keys in both bases, and of values (basis.Basis).

    Those of a latent are ``axes``, those of its rope key ``values``; ``channels`` is None then.
    """

    axes: Sequence[float]
    values: Sequence[float]
    channels: Sequence[float] | None = None

    def keys(self, basis: str) -> Sequence[float]:
        """Those of keys in ``basis``, or of a latent."""
        return self.axes if basis != "channels" or self.channels is None else self.channels

    @classmethod
    def typical(cls, attention: AttentionSpec, latent: LatentSpec | None = None) -> Energies:
        """Those of a layer that nobody looked at: evenly falling."""
        if latent is not None:
            return cls(axes=_falling(latent.kv_lora_rank), values=_falling(latent.qk_rope_head_dim // 2) * 2)
        falling = _falling(attention.num_kv_heads * attention.head_dim)
        pairs, rest = attention.num_kv_heads * attention.rope_pairs, 2 * attention.num_kv_heads * attention.rope_pairs
        return cls(axes=falling, channels=falling[:pairs] * 2 + falling[rest:], values=falling)


def _falling(width: int) -> list[float]:
    return [FALL ** (place / width) for place in range(width)]


def layer_window(attention: AttentionSpec, exact_window: int) -> int:
    """The exact window of a layer: none where it would be most of what the layer sees anyway."""
    sliding = attention.sliding_window
    return exact_window if sliding is None or sliding >= 2 * exact_window else 0


def plan_layers(
    attentions: Sequence[AttentionSpec], energies: Sequence[Energies], settings: TransformCoding
) -> list[LayerCoding]:
    """Bits for all layers from one budget; any axes for keys where the cost of decoding allows it.

    Raises:
        InfeasibleError: the budget or the cost cannot be met; names what can.
    """
    numbers = sum(attention.cached_numbers for attention in attentions)
    budget = int(settings.kv_cache * 2 * numbers + 1e-9)
    if budget < (least := 2 * len(attentions)):
        raise InfeasibleError(
            f"kv_cache {settings.kv_cache:g} leaves {budget} bytes per token, and every layer takes 2 at least: the "
            f"smallest possible is kv_cache {-(-least * 10000 // (2 * numbers)) / 10000:g}"
        )
    _check_cost(attentions, settings)
    bases = [_best_basis(*layer) for layer in zip(attentions, energies, strict=True)]
    while True:
        rows = [
            row
            for attention, energy, basis in zip(attentions, energies, bases, strict=True)
            for row in _rows(attention, energy, basis, settings)
        ]
        bits = allocate(rows, budget)
        layers = [
            LayerCoding(
                key_basis=basis,
                key_bits=tuple(keys),
                value_bits=tuple(values),
                predicted_kl=(error(energy.keys(basis), keys) + error(energy.values, values)) / 2,
            )
            for energy, basis, keys, values in zip(energies, bases, bits[::2], bits[1::2], strict=True)
        ]
        dear = [
            basis == "axes" and decode_cost(attention, layer) > _most(attention, settings)
            for attention, layer, basis in zip(attentions, layers, bases, strict=True)
        ]
        if not any(dear):
            return layers
        bases = ["channels" if too_dear else basis for basis, too_dear in zip(bases, dear, strict=True)]


def _best_basis(attention: AttentionSpec, energy: Energies) -> str:
    """The basis of keys, or of a latent, that loses least."""
    if energy.channels is None:
        return "own"
    return "axes" if attention.rope_pairs else "channels"


def _check_cost(attentions: Sequence[AttentionSpec], settings: TransformCoding) -> None:
    """Refuses a cost of decoding at which a layer could not even read one channel and one value."""
    if settings.decode_cost == "any":
        return
    least = max((2 * bool(each.rope_pairs) or 1) + 1 for each in attentions) / 2
    if short := [each.head_dim for each in attentions if settings.decode_cost * each.head_dim < least]:
        raise InfeasibleError(
            f"decode_cost {settings.decode_cost:g} is less than one channel and one value take: the smallest "
            f"possible is decode_cost {-(-least * 10000 // min(short)) / 10000:g}"
        )


def decode_cost(attention: AttentionSpec, layer: LayerCoding) -> int:
    """Multiply-adds of the scores and the context of one new token per cached one; the original takes 2 H d.

    On channels scores are computed as they are; keys on any axes are rebuilt first. Values are never rebuilt.
    """
    values = sum(map(bool, layer.value_bits))
    keys = sum(map(bool, layer.key_bits))
    if layer.key_basis == "axes":
        width = attention.num_kv_heads * attention.head_dim
        return keys * width + attention.num_heads * (attention.head_dim + values)
    pairs = layer.channels(attention)
    parts = zip(layer.key_bits[:pairs], layer.key_bits[pairs : 2 * pairs], strict=True)
    kept = 2 * sum(map(any, parts)) + sum(map(bool, layer.key_bits[2 * pairs :]))
    return attention.num_heads * (kept + values)


def ordered(bits: Sequence[int], channels: int) -> list[int]:
    """Places of coefficients, the most bits first; those of ``channels`` channels keep their two parts apart."""
    real, imag = bits[:channels], bits[channels : 2 * channels]
    pairs = sorted(range(channels), key=lambda place: (-max(real[place], imag[place]), -real[place], -imag[place]))
    rest = sorted(range(2 * channels, len(bits)), key=lambda place: -bits[place])
    return [*pairs, *(channels + place for place in pairs), *rest]


def _coding(bits: Sequence[int], channels: int) -> Coding:
    if not bits:  # the rope key of a family without rope
        return Coding(bits=((16, 0),), kind="plain")
    runs = groupby(bits[place] for place in ordered(bits, channels))
    return Coding(bits=tuple((width, len(list(run))) for width, run in runs))


def _rows(
    attention: AttentionSpec, energies: Energies, basis: str, settings: TransformCoding
) -> tuple[Sequence[float], Sequence[float]]:
    """Energies of keys and values; on channels, none of coefficients that decoding has no time for."""
    if basis != "channels" or settings.decode_cost == "any":
        return energies.keys(basis), energies.values
    pairs = attention.num_kv_heads * attention.rope_pairs
    keys, values = list(energies.keys(basis)), list(energies.values)
    groups: list[list[tuple[list[float], int]]] = [[(keys, place), (keys, place + pairs)] for place in range(pairs)]
    groups += [[(row, place)] for row, first in ((keys, 2 * pairs), (values, 0)) for place in range(first, len(row))]
    groups.sort(key=lambda group: -sum(row[place] for row, place in group) / len(group))
    left = int(_most(attention, settings) / attention.num_heads)
    for group in groups:
        if len(group) <= left:
            left -= len(group)
            continue
        for row, place in group:
            row[place] = 0.0
    return keys, values


def _most(attention: AttentionSpec, settings: TransformCoding) -> float:
    """Multiply-adds per cached token that a layer may take."""
    factor = float("inf") if settings.decode_cost == "any" else settings.decode_cost
    return factor * 2 * attention.num_heads * attention.head_dim

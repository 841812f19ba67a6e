"""What every layer's cache is coded with under a budget: forms of keys and values, and bits. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from anymla.account import slot_bytes
from anymla.errors import InfeasibleError
from anymla.methods.cache_coding.allocation import allocate, at_price, coding, error, price, typical
from anymla.methods.cache_coding.forms import AXES, Form, forms, most_operations
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.methods.cache_coding.transform_coding import TransformCoding

ROUNDS = 4  # of choosing forms at the price of a bit, and the price with these forms


class LayerCoding(BaseModel):
    """How one layer is coded.

    ``key_basis``, ``key_block``, ``value_block``: its forms. ``key_bits``, ``value_bits``: of every coefficient, in the
    basis's own order (basis.py). ``predicted_kl``: nats per token that it costs, after small and independent errors.
    ``facts``: what the survey says of the layer; None before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    key_basis: str
    key_block: int
    value_block: int
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    predicted_kl: float
    facts: Any = Field(default=None, exclude=True, repr=False)

    @property
    def keys(self) -> Form:
        """The form of keys."""
        return Form(self.key_basis, self.key_block)

    @property
    def values(self) -> Form:
        """The form of values."""
        return Form(AXES, self.value_block)

    def spec(self, attention: AttentionSpec, first_tokens: int, exact_window: int) -> CodedSpec:
        """The cache of a layer."""
        heads = attention.num_kv_heads
        return CodedSpec(
            keys=coding(self.key_bits, ordered(self.key_bits, self.keys, "key", attention)),
            values=coding(self.value_bits, ordered(self.value_bits, self.values, "value", attention)),
            key_basis=self.key_basis,
            value_basis="axes",
            key_block=self.key_block % heads,
            value_block=self.value_block % heads,
            first_tokens=first_tokens,
            exact_window=layer_window(attention, exact_window),
            rope_scale=1.0 if self.facts is None else self.facts["rope_scale"],
        )


@dataclass(frozen=True, kw_only=True)
class Energies:
    """What the coefficients of a layer carry (basis.Basis), of keys and of values, by the name of their form."""

    keys: Mapping[str, Sequence[float]]
    values: Mapping[str, Sequence[float]]

    @classmethod
    def typical(cls, attention: AttentionSpec, settings: TransformCoding) -> Energies:
        """Those of a layer that nobody looked at: evenly falling in each block."""
        made = (
            {form.name: _falling(form, kind, attention) for form in possible}
            for kind, possible in zip(("key", "value"), forms(attention, settings.decode_cost), strict=True)
        )
        return cls(keys=next(made), values=next(made))


def _falling(form: Form, kind: str, attention: AttentionSpec) -> list[float]:
    row, of_block = [0.0] * (attention.num_kv_heads * attention.head_dim), typical(form.block * attention.head_dim)
    for group in form.groups(kind, attention):
        for place in group:
            row[place] = of_block[group[0] % len(of_block)]
    return row


def layer_window(attention: AttentionSpec, exact_window: int) -> int:
    """The exact window of a layer: none where it would be most of what the layer sees anyway."""
    sliding = attention.sliding_window
    return exact_window if sliding is None or sliding >= 2 * exact_window else 0


def plan_layers(
    attentions: Sequence[AttentionSpec], energies: Sequence[Energies], settings: TransformCoding, exact: int = 0
) -> list[LayerCoding]:
    """Bits for all layers from one budget; any axes for keys where the cost of decoding allows it.

    ``exact``: bytes of the budget that exact tokens take.

    Raises:
        InfeasibleError: the budget or the cost cannot be met; names what can.
    """
    budget, held = byte_budget(attentions, settings, exact), [*rows_held(attentions, settings)]
    _check_cost(attentions, settings)
    layers = [_Layer(*each, settings) for each in zip(attentions, energies, strict=True)]
    chosen = [layer.pairs()[0] for layer in layers]
    for _ in range(ROUNDS if any(len(layer.pairs()) > 1 for layer in layers) else 0):
        bit = price([row for layer, pair in zip(layers, chosen, strict=True) for row in layer.rows(pair)], budget, held)
        before, chosen = chosen, [layer.best(bit) for layer in layers]
        if chosen == before:
            break
    bit = price([row for layer, pair in zip(layers, chosen, strict=True) for row in layer.rows(pair)], budget, held)
    rows = [row for layer, pair in zip(layers, chosen, strict=True) for row in layer.affordable(pair, bit)]
    bits = allocate(rows, budget, held)
    made = zip(layers, chosen, bits[::2], bits[1::2], strict=True)
    return [layer.coding(pair, keys, values) for layer, pair, keys, values in made]


def byte_budget(attentions: Sequence[AttentionSpec], settings: TransformCoding, exact: int) -> int:
    """Bytes for codes: of a token in all layers, or of a cache of ``context`` tokens less those of ``exact`` ones.

    Raises:
        InfeasibleError: too few; names what can be.
    """
    held = [tokens_held(attention, settings) for attention in attentions]
    numbers = sum(tokens * attention.cached_numbers for tokens, attention in zip(held, attentions, strict=True))
    budget = int(settings.kv_cache * 2 * numbers + 1e-9) - exact
    if budget < (least := 2 * sum(held)):
        where = "per token" if settings.context is None else f"at {settings.context} tokens"
        beside = f" beside {exact} of first and latest tokens" if exact else ""
        smallest = -(-(least + exact) * 10000 // (2 * numbers)) / 10000
        raise InfeasibleError(
            f"kv_cache {settings.kv_cache:g} leaves {max(0, budget)} bytes {where}{beside}, and every layer takes 2 a "
            f"token at least: the smallest possible is kv_cache {smallest:g}"
        )
    return budget


def exact_bytes(layer: LayerSpec, settings: TransformCoding, exact_window: int) -> int:
    """Bytes of the first and the latest tokens that a layer holds exactly at ``context``; 0 without it."""
    if settings.context is None or layer.attention is None:
        return 0
    keys, values = (Coding(bits=((16, size),), kind="plain") for size in layer.coded_sizes)
    window = layer_window(layer.attention, exact_window)
    coded = CodedSpec(keys=keys, values=values, first_tokens=settings.first_tokens, exact_window=window)
    slots = [slot for slot in replace(layer, coded=coded).slots if slot.once]
    return sum(slot_bytes(slot, settings.context, "bfloat16") for slot in slots)


def tokens_held(attention: AttentionSpec, settings: TransformCoding) -> int:
    """Tokens that a layer holds of ``context``; 1 without it, for then all layers count the same."""
    if settings.context is None:
        return 1
    window = attention.cache_window
    return settings.context if window is None else max(1, min(settings.context, window - 1))


def rows_held(attentions: Sequence[AttentionSpec], settings: TransformCoding) -> Iterator[int]:
    """The same of each layer's two rows."""
    for attention in attentions:
        yield from (tokens_held(attention, settings),) * 2


@dataclass(frozen=True)
class _Layer:
    """One layer's part of the plan: pairs of forms, of keys and of values."""

    attention: AttentionSpec
    energies: Energies
    settings: TransformCoding

    def pairs(self) -> list[tuple[Form, Form]]:
        """Those that may be chosen."""
        return [*product(*forms(self.attention, self.settings.decode_cost))]

    @property
    def _held(self) -> int:
        return tokens_held(self.attention, self.settings)

    def rows(self, pair: tuple[Form, Form]) -> tuple[Sequence[float], Sequence[float]]:
        """Energies of keys and values."""
        return self.energies.keys[pair[0].name], self.energies.values[pair[1].name]

    def best(self, bit: float) -> tuple[Form, Form]:
        """The pair that loses least where a bit of a token costs ``bit``."""
        return min(self.pairs(), key=lambda pair: self._lost(pair, bit))

    def _lost(self, pair: tuple[Form, Form], bit: float) -> float:
        full, limited, bit = self.rows(pair), self.affordable(pair, bit), bit * self._held
        dropped = sum(sum(row) - sum(kept) for row, kept in zip(full, limited, strict=True))
        return dropped + sum(at_price(energy, bit)[1] for row in limited for energy in row if energy)

    def affordable(self, pair: tuple[Form, Form], bit: float) -> tuple[Sequence[float], Sequence[float]]:
        """The rows with zeros in place of coefficients that decoding has no time for.

        Those are kept that gain most per multiply-add where a bit costs ``bit``, the best of each row before all.
        """
        rows, bit = self.rows(pair), bit * self._held
        if self.settings.decode_cost == "any":
            return rows
        left, groups = most_operations(self.attention, self.settings.decode_cost), []
        for kind, form, row in zip(("key", "value"), pair, rows, strict=True):
            each, fixed = form.costs(kind, self.attention)
            left -= fixed
            of_row = []
            for group in form.groups(kind, self.attention):
                cost, energy = len(group) * each, sum(row[place] for place in group)
                gain = energy - sum(at_price(row[place], bit)[1] for place in group)
                of_row.append((gain / cost, energy, cost, kind, group))
            of_row.sort(key=lambda found: found[:2], reverse=True)
            groups += [(place > 0, *found) for place, found in enumerate(of_row)]
        kept = {"key": [0.0] * len(rows[0]), "value": [0.0] * len(rows[1])}
        for *_, cost, kind, group in sorted(groups, key=lambda found: (found[0], -found[1], -found[2])):
            if cost <= left:
                left -= cost
                for place in group:
                    kept[kind][place] = rows[kind == "value"][place]
        return kept["key"], kept["value"]

    def coding(self, pair: tuple[Form, Form], keys: Sequence[int], values: Sequence[int]) -> LayerCoding:
        """The pair with these bits."""
        of_keys, of_values = self.rows(pair)
        return LayerCoding(
            key_basis=pair[0].basis,
            key_block=pair[0].block,
            value_block=pair[1].block,
            key_bits=tuple(keys),
            value_bits=tuple(values),
            predicted_kl=(error(of_keys, keys) + error(of_values, values)) / 2,
        )


def _check_cost(attentions: Sequence[AttentionSpec], settings: TransformCoding) -> None:
    """Refuses a cost of decoding at which a layer could not even read one channel and one value."""
    if settings.decode_cost == "any":
        return
    least = [((2 if each.rope_pairs else 1) + 1) / (2 * each.num_kv_heads * each.head_dim) for each in attentions]
    if not settings.decode_cost >= (most := max(least)):
        raise InfeasibleError(
            f"decode_cost {settings.decode_cost:g} is less than one channel and one value take: the smallest "
            f"possible is decode_cost {math.ceil(most * 10000) / 10000:g}"
        )


def decode_cost(attention: AttentionSpec, layer: LayerCoding) -> int:
    """Multiply-adds of the scores and the context of one new token per cached one; the original takes 2 H d."""
    keys = layer.keys.operations("key", layer.key_bits, attention)
    return keys + layer.values.operations("value", layer.value_bits, attention)


def ordered(bits: Sequence[int], form: Form, kind: str, attention: AttentionSpec) -> list[int]:
    """Places of coefficients, the most bits first in every block; channels' real parts, then their imaginary ones."""
    width = form.block * attention.head_dim
    places: list[int] = []
    for start in range(0, len(bits), width):
        groups = [group for group in form.groups(kind, attention) if start <= group[0] < start + width]
        groups.sort(key=lambda group: [-max(bits[place] for place in group), *(-bits[place] for place in group)])
        for part in zip(*(group for group in groups if len(group) == 2), strict=True):
            places += part
        places += [group[0] for group in groups if len(group) == 1]
    return places

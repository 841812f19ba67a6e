"""The forms in which keys and values of a layer may be coded, and what decoding costs in each. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from anymla.modeling.attention_spec import AttentionSpec

AXES, CHANNELS = "axes", "channels"
WIDEST = 8  # heads of a block, where decoding must be cheap: wider ones cost more than their few kept coefficients
WORTH = 1 / 4  # of the coefficients that must be affordable, for keys to be rebuilt


@dataclass(frozen=True)
class Form:
    """A basis that mixes blocks of ``block`` key/value heads: "channels", complex axes within rope pairs, or "axes".

    Values are always in axes, and always read as they are: the basis is absorbed into the output. Keys are so in
    channels; in axes they are rebuilt.
    """

    basis: str
    block: int

    @property
    def name(self) -> str:
        """What facts of the survey call it."""
        return f"{self.basis} {self.block}"

    def rebuilds(self, kind: str) -> bool:
        """Whether "key" or "value" is rebuilt when it is read."""
        return kind == "key" and self.basis == AXES

    def costs(self, kind: str, attention: AttentionSpec) -> tuple[int, int]:
        """Multiply-adds per cached token for one new token: of each kept coefficient, and beside these."""
        if self.rebuilds(kind):
            return self.block * attention.head_dim, attention.num_heads * attention.head_dim
        return attention.num_heads * self.block // attention.num_kv_heads, 0

    def groups(self, kind: str, attention: AttentionSpec) -> Iterator[tuple[int, ...]]:
        """Places of coefficients that are kept together: a channel's two parts, all others by themselves."""
        width = self.block * attention.head_dim
        pairs = self.block * attention.rope_pairs if kind == "key" and self.basis == CHANNELS else 0
        for start in range(0, attention.num_kv_heads * attention.head_dim, width):
            yield from ((start + pair, start + pairs + pair) for pair in range(pairs))
            yield from ((place,) for place in range(start + 2 * pairs, start + width))

    def operations(self, kind: str, bits: Sequence[int], attention: AttentionSpec) -> int:
        """Multiply-adds of the scores, or the context, of one new token per cached one; ``bits``: of coefficients."""
        each, fixed = self.costs(kind, attention)
        kept = (len(group) for group in self.groups(kind, attention) if any(bits[place] for place in group))
        return fixed + each * sum(kept)


def forms(attention: AttentionSpec, decode_cost: float | Literal["any"]) -> tuple[list[Form], list[Form]]:
    """Forms of keys, and of values, that are to be tried."""
    heads, size = attention.num_kv_heads, attention.num_kv_heads * attention.head_dim
    if decode_cost == "any":
        return [Form(AXES if attention.rope_pairs else CHANNELS, heads)], [Form(AXES, heads)]
    blocks = [block for block in range(1, min(heads, WIDEST) + 1) if heads % block == 0]
    keys = [Form(CHANNELS, block) for block in blocks]
    for form in (Form(AXES, block) for block in blocks if attention.rope_pairs):
        each, fixed = form.costs("key", attention)
        if most_operations(attention, decode_cost) - fixed >= WORTH * size * each:
            keys.append(form)
    return keys, [Form(AXES, block) for block in blocks]


def forms_of_all(
    attention: AttentionSpec, decode_costs: Iterable[float | Literal["any"]]
) -> tuple[list[Form], list[Form]]:
    """Those of several costs of decoding, each once."""
    keys, values = zip(*(forms(attention, cost) for cost in decode_costs), strict=True)
    return [*dict.fromkeys(chain(*keys))], [*dict.fromkeys(chain(*values))]


def most_operations(attention: AttentionSpec, decode_cost: float | Literal["any"]) -> float:
    """Multiply-adds per cached token that a layer may take; the original takes 2 H d."""
    factor = float("inf") if decode_cost == "any" else decode_cost
    return factor * 2 * attention.num_heads * attention.head_dim

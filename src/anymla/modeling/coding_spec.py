"""How a coded cache holds keys and values: one row of bytes each per token.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .attention_spec import AttentionSpec
from .described import checked, shortened
from .slot_spec import Slot, exact_slots

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 16)  # bits that a coefficient may have
PLANES = (16, 8, 4, 2, 1)  # a word's bits are cut into these, so that each plane of a row packs without gaps
SCALE_BYTES = 2  # of a float16: a scale, a zero point, an outlier's value
INDEX_BYTES = 2  # of an outlier's place
PAIRED = 4  # codes of at most so many bits share a word with the next one, so that one look-up reads two
KINDS = ("table", "int", "fp8", "plain")
BASES = ("own", "channels", "axes")


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How the coefficients of one token become a row of bytes.

    Args:
        bits: (bits, how many coefficients) in the coefficients' order, as runs.
        kind: "table": levels of each coefficient, static; "int" and "fp8": a grid, with a scale per token and block;
            "plain": numbers of the cache's own dtype.
        token_scale: whether a "table" codes the token's coefficients less their zero point, over their scale, both
            stored per token (KVQuant's values).
        block: coefficients that share a scale, of "int" and "fp8"; 0: all.
        outliers: coefficients of a token, the farthest from their levels, kept apart as float16 with their index.
    """

    bits: tuple[tuple[int, int], ...]
    kind: str = "table"
    token_scale: bool = False
    block: int = 0
    outliers: int = 0

    def __post_init__(self) -> None:
        widths = {bits for bits, _ in self.bits}
        if unknown := widths - {*WIDTHS}:
            raise ValueError(f"coding: bits must be among {WIDTHS}, got {min(unknown)}")
        if self.kind not in KINDS:
            raise ValueError(f"coding: kind must be one of {', '.join(KINDS)}, got {self.kind!s:.20}")
        if not 0 <= self.outliers < max(1, self.width):
            raise ValueError(f"coding: {self.outliers} outliers of {self.width} coefficients")
        if self.kind != "table":
            allowed = {"int": ({4}, {8}), "fp8": ({8},), "plain": ({16},)}[self.kind]
            if widths not in allowed or self.token_scale or self.outliers:
                raise ValueError(f"coding: kind {self.kind} has one width of {allowed} bits, and only tables more")

    @property
    def width(self) -> int:
        """Coefficients that come in and go out."""
        return sum(count for _, count in self.bits)

    @property
    def code_bits(self) -> int:
        """Bits of a row's codes alone."""
        return sum(bits * count for bits, count in self.bits)

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many coefficients have so many bits, by falling bits."""
        widths = sorted({bits for bits, _ in self.bits}, reverse=True)
        return {width: sum(count for bits, count in self.bits if bits == width) for width in widths}

    @property
    def table_numbers(self) -> int:
        """Levels of all coefficients."""
        return sum(2**bits * count for bits, count in self.counts.items() if 0 < bits < 16 and self.kind == "table")

    def slot(self, name: str, window: int | None) -> Slot:
        """What a cache holds of every token, up to ``window`` of them."""
        if self.kind == "plain":
            return Slot(name=name, width=self.width, tokens=window)
        return Slot(name=name, width=self.row_bytes, tokens=window, codec="byte")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: every plane of words in whole bytes, scales, outliers with their index; not of "plain"."""
        words = [word(bits, count) for bits, count in self.counts.items()]
        codes = sum(-(-plane * sum(count for bits, count in words if bits & plane) // 8) for plane in PLANES)
        blocks = -(-self.width // (self.block or max(1, self.width)))
        scales = 2 if self.token_scale else blocks if self.kind in ("int", "fp8") else 0
        return codes + scales * SCALE_BYTES + self.outliers * (SCALE_BYTES + INDEX_BYTES)


def word(bits: int, count: int) -> tuple[int, int]:
    """Bits of a word, and how many words ``count`` codes of ``bits`` bits need."""
    return (2 * bits, -(-count // 2)) if bits <= PAIRED else (bits, count)


@dataclass(frozen=True, kw_only=True)
class CodedSpec:
    """A cache of codes: keys before rope and values, each in a basis; or a latent and its rope key before rope.

    Args:
        keys, values: how their coefficients are stored; those of a latent, of a rope key. In "axes" there may be
            fewer than G d of them: a cache of low rank, first tokens too, without an exact window.
        key_basis: "own": the keys themselves; "channels": complex axes across key/value heads within one rope
            frequency, on which scores are computed; "axes": any axes, from which keys are rebuilt when they are read.
        value_basis: "own" or "axes".
        key_block, value_block: key/value heads that a basis mixes with each other, a divisor of all; 0: all of them.
        first_tokens: tokens at the start of every sequence whose coefficients are kept exactly.
        exact_window: tokens before and with each query that it sees exactly, 2 or more; 0: none.
        rope_scale: what rope multiplies queries and keys with, beside turning them (yarn).
    """

    keys: Coding
    values: Coding
    key_basis: str = "axes"
    value_basis: str = "axes"
    key_block: int = 0
    value_block: int = 0
    first_tokens: int = 4
    exact_window: int = 0
    rope_scale: float = 1.0

    def block_widths(self, attention: AttentionSpec) -> tuple[int, int]:
        """Coefficients of a block of keys, and of values."""
        keys = 1 if self.key_basis == "own" else self.key_block
        values = 1 if self.value_basis == "own" else self.value_block
        return keys * attention.head_dim or self.keys.width, values * attention.head_dim or self.values.width

    def slots(self, attention: AttentionSpec, window: int | None) -> tuple[Slot, ...]:
        """What the cache of such a layer holds: rows of bytes, the first tokens with their columns, the last tokens.

        ``window``: most tokens that the cache keeps; None: all.
        """
        sides = {"keys": self.keys, "values": self.values}
        slots = [side.slot(name, window) for name, side in sides.items()]
        if first := self.first_tokens:
            once: Any = {"tokens": first, "once": True, "until": None if window is None else window + first}
            slots += [Slot(name=f"first_{name}", width=side.width, **once) for name, side in sides.items()]
            slots.append(Slot(name="first_columns", width=1, codec="index", **once))
        return (*slots, *exact_slots(attention.cached_numbers // 2, self.exact_window))

    @property
    def rounds(self) -> bool:
        """Whether numbers become codes; else they are kept as they are."""
        return any(side.kind != "plain" for side in (self.keys, self.values))

    @property
    def low_rank(self) -> bool:
        """Whether the coefficients are numbers in one basis of all heads, so that codes may take their place."""
        own = (self.key_basis, self.value_basis, self.key_block, self.value_block)
        return not self.rounds and own == ("axes", "axes", 0, 0) and not self.exact_window

    def plain(self) -> CodedSpec:
        """The same coefficients as numbers of the cache's own dtype."""
        keys, values = (Coding(bits=((16, side.width),), kind="plain") for side in (self.keys, self.values))
        return replace(self, keys=keys, values=values, first_tokens=0, exact_window=0)  # all are exact

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return {**(shortened(self) or {}), "keys": shortened(self.keys), "values": shortened(self.values)}

    @classmethod
    def of(cls, described: Any, attention: AttentionSpec | None) -> CodedSpec:
        """The cache that ``to_dict`` described, of a layer with this attention.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        described = checked(cls, described)
        described |= {name: _coding(described[name]) for name in ("keys", "values")}
        coded = cls(**described)
        for name, allowed in (("key_basis", BASES), ("value_basis", ("own", "axes"))):
            if (basis := getattr(coded, name)) not in allowed:
                raise ValueError(f"CodedSpec: {name} must be one of {', '.join(allowed)}, got {basis!s:.20}")
        heads = attention.num_kv_heads if attention else 0
        for name in ("key_block", "value_block"):
            if type(block := getattr(coded, name)) is not int or block < 0 or heads % (block or 1):
                raise ValueError(f"CodedSpec: {name} must divide the {heads} key/value heads, got {block!s:.20}")
        coded._check_tokens()
        scale = coded.rope_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
            raise ValueError(f"CodedSpec: rope_scale must be a positive number, got {scale!s:.20}")
        return coded

    def _check_tokens(self) -> None:
        for name, few in (("first_tokens", "0 or more"), ("exact_window", "0, or 2 or more")):
            tokens = getattr(self, name)
            if type(tokens) is not int or tokens < 0 or (name == "exact_window" and tokens == 1):
                raise ValueError(f"CodedSpec: {name} must be a number of tokens, {few}, got {tokens!s:.20}")

    def check(self, keys: int, values: int, *, gauge: bool) -> None:
        """Refuses a description of another layer than one of so many keys and values; ``gauge``: of any basis.

        Raises:
            ValueError: the message says which field.
        """
        for name, basis, size in (("keys", self.key_basis, keys), ("values", self.value_basis, values)):
            least = 1 if basis == "axes" and not self.exact_window else size
            if not least <= (found := getattr(self, name).width) <= size:
                raise ValueError(f"CodedSpec: {name}: {found} coefficients, the layer has {size}")
        if not gauge and ((self.key_basis, self.value_basis) != ("own", "own") or self.exact_window):
            raise ValueError("CodedSpec: a coded latent has its own basis and no exact window")


def _coding(described: Any) -> Coding:
    described = checked(Coding, described)
    runs = described["bits"]
    pairs = isinstance(runs, list | tuple) and all(isinstance(run, list | tuple) and len(run) == 2 for run in runs)
    if not pairs or not all(type(number) is int and number >= 0 for run in runs for number in run):
        raise ValueError(f"Coding: bits must be a list of pairs [bits, how many coefficients], got {runs!s:.40}")
    return Coding(**described | {"bits": tuple((bits, count) for bits, count in runs)})

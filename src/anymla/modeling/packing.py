"""How a layer's linear weights are packed: integers in groups, as compressed-tensors' pack-quantized holds them.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

CACHE_BITS = 4  # at least, of projections that make keys and values
WORD = 32
SHAPE_BYTES = 16  # two int64


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Integers of ``bits``, as many below zero as above, with a scale for each ``group`` of a row's inputs.

    ``cache_bits``: of projections that make keys and values in a stock attention.
    """

    bits: int
    group: int

    @property
    def cache_bits(self) -> int:
        """Bits of projections whose error lands in every cached token."""
        return max(self.bits, CACHE_BITS)

    def linear_bytes(self, outputs: int, inputs: int, number: int) -> int:
        """Bytes of a packed weight [outputs,inputs] with its scales; ``number``: bytes of a scale."""
        words = -(-inputs * self.bits // WORD)
        return outputs * (words * WORD // 8 + inputs // self.group * number) + SHAPE_BYTES

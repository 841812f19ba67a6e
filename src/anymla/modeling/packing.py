"""How a layer's linear weights are packed: integers in groups, as compressed-tensors' pack-quantized holds them.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

CACHE_BITS = 4  # at least, of projections that make keys and values


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Integers of ``bits``, as many below zero as above, with a scale for each ``group`` of a row's inputs."""

    bits: int
    group: int

    @property
    def cache_bits(self) -> int:
        """Bits of projections in a stock attention whose error lands in every cached token."""
        return max(self.bits, CACHE_BITS)

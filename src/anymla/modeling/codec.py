"""What every codec of a coded cache is: coefficients of a token to a row of bytes, and back.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .coding_spec import Coding

FLOAT16_MAX = torch.finfo(torch.float16).max
FLOAT16_TINY = 2.0**-24  # its smallest number


class Codec(nn.Module):
    """Coefficients [..., width] to rows of bytes, uint8 [..., row_bytes], and back."""

    def __init__(self, coding: Coding) -> None:
        super().__init__()
        self.coding = coding
        self.width = coding.width
        self.row_bytes = coding.row_bytes

    def set_tables(self, tables: Mapping[int, Tensor]) -> None:
        """Takes over levels, in a codec that has some.

        Raises:
            ValueError: it has none.
        """
        if tables:
            raise ValueError(f"codes of kind {self.coding.kind} have no tables")

    def encode(self, x: Tensor) -> Tensor:
        """The rows, uint8 [..., row_bytes], of coefficients [..., width]."""
        raise NotImplementedError

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The coefficients [..., width] that the rows hold."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What is read back of ``x``; its gradient passes as if nothing was lost (straight-through)."""
        return _StraightThrough.apply(x, self)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: Codec) -> Tensor:
        return codec.decode(codec.encode(x), x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def pack(words: Tensor, bits: int) -> Tensor:
    """Words [..., n], uint8 and below 2**bits, as bytes [..., ceil(n bits / 8)]; the first word is a byte's lowest."""
    per_byte = 8 // bits
    if per_byte == 1:
        return words
    parts = pad(words, (0, -words.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    return (parts << torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The words [..., n], uint8, that ``pack`` put into bytes, and those that fill up the last byte."""
    if bits == 8:
        return packed
    words = _words_of_bytes(bits, packed.device).index_select(0, packed.flatten().int())
    return words.view(packed.shape).view(torch.uint8)


@cache
def _words_of_bytes(bits: int, device: torch.device) -> Tensor:
    """For each byte [256] the 8 / bits words in it, side by side as one integer: one look-up cuts a byte."""
    words = torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, bits, device=device)
    return (words & 2**bits - 1).to(torch.uint8).view({4: torch.int16, 2: torch.int32, 1: torch.int64}[bits])[:, 0]


def joined(parts: list[Tensor]) -> Tensor:
    """The parts, one after the other. A single one is unchanged."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def encode_half(x: Tensor) -> Tensor:
    """Numbers as the bytes of float16, within its range."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().view(torch.uint8)


def decode_half(packed: Tensor) -> Tensor:
    """The float16 of these bytes, wherever they lie."""
    numbers = torch.empty(*packed.shape[:-1], packed.shape[-1] // 2, dtype=torch.float16, device=packed.device)
    numbers.view(torch.uint8).copy_(packed)  # a row may start at an odd byte
    return numbers

"""What every codec of a coded cache is: coefficients of a token to a row of bytes, and back.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

Codes of 1, 2, 4 or 8 bits are packed without gaps: code i of n lies in byte i % B of B = ceil(n bits / 8), so that one
shift per code of a byte cuts them all.
"""

from __future__ import annotations

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


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], uint8 and below 2**bits, as bytes [..., ceil(n bits / 8)]."""
    per_byte = 8 // bits
    parts = pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (per_byte, -1)).unbind(-2)
    packed = parts[0]
    for place, part in enumerate(parts[1:], start=1):
        packed = packed | part << place * bits
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes [..., count], uint8, that ``pack`` put into bytes."""
    if bits == 8:
        return packed
    parts = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, -1)[..., :count]


def encode_half(x: Tensor) -> Tensor:
    """Numbers as the bytes of float16, within its range."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().view(torch.uint8)


def decode_half(packed: Tensor) -> Tensor:
    """The float16 of these bytes, wherever they lie."""
    numbers = torch.empty(*packed.shape[:-1], packed.shape[-1] // 2, dtype=torch.float16, device=packed.device)
    numbers.view(torch.uint8).copy_(packed)  # a row may start at an odd byte
    return numbers

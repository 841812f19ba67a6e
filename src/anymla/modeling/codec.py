"""What every codec of a coded cache is: coefficients of a token to a row of bytes, and back.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .coding_spec import Coding
from .room import Room

Made = TypeVar("Made")
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
        return self.read(rows, dtype, Room()).to(dtype)

    def read(self, rows: Tensor, dtype: torch.dtype, room: Room) -> Tensor:
        """The same in float32 or finer, with levels that ``dtype`` rounds, in ``room``.

        All tokens of a coefficient lie side by side, and so loops over numbers are loops over tokens.
        """
        lines = rows[(None,) * (3 - rows.dim())].flatten(0, -3)
        batch, tokens, size = lines.shape
        columns = room.empty("columns", (size, batch, tokens), torch.uint8, rows.device).copy_(lines.permute(2, 0, 1))
        x = room.empty("coefficients", (batch, self.width, tokens), torch.float32, rows.device)
        self._read(columns.flatten(1), x, dtype, room)
        return x.mT.view(*rows.shape[:-1], self.width)

    def _read(self, columns: Tensor, x: Tensor, dtype: torch.dtype, room: Room) -> None:
        """Puts into ``x`` [B,width,c] what the bytes [row_bytes,B c] hold."""
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


class Kept:
    """What was made of a tensor, kept until the tensor changes."""

    def __init__(self) -> None:
        self._of: tuple[Tensor, int] | None = None
        self._made: dict[Any, Any] = {}

    def get(self, tensor: Tensor, make: Callable[..., Made], *settings: Any) -> Made:
        """``make(*settings)``, made anew only if ``tensor`` changed."""
        version = 0 if tensor.is_inference() else tensor._version
        if self._of is None or self._of[0] is not tensor or self._of[1] != version:
            self._made, self._of = {}, (tensor, version)
        key = (make.__name__, torch.is_inference_mode_enabled(), *settings)
        if key not in self._made:
            self._made[key] = make(*settings)
        return self._made[key]


def pack(words: Tensor, bits: int) -> Tensor:
    """Words [..., n], uint8 and below 2**bits, as bytes [..., ceil(n bits / 8)]; the first word is a byte's lowest."""
    per_byte = 8 // bits
    if per_byte == 1:
        return words
    parts = pad(words, (0, -words.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    return (parts << torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, room: Room) -> Tensor:
    """The words [n,N], uint8, that ``pack`` put into bytes, here [bytes,N], and those that fill up the last byte."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    words = room.empty(f"words of {bits}", (len(packed), len(shifts), packed.shape[1]), torch.uint8, packed.device)
    torch.bitwise_right_shift(packed[:, None], shifts, out=words)
    return words.bitwise_and_(2**bits - 1).view(-1, packed.shape[1])


def joined(parts: list[Tensor]) -> Tensor:
    """The parts, one after the other. A single one is unchanged."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def encode_half(x: Tensor) -> Tensor:
    """Numbers as the bytes of float16, within its range."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().view(torch.uint8)


def decode_half(packed: Tensor) -> Tensor:
    """The float16 [n, N] of bytes [2 n, N]."""
    return (packed[::2] | packed[1::2].to(torch.int16) << 8).view(torch.float16)

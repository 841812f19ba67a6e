"""Codecs of a coded cache: the coefficients of a token become a row of bytes, and numbers again.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

A row: 16-bit numbers first (scales, then outliers: values and places), then the codes, plane by plane (coding_spec.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codec import FLOAT16_TINY, Codec, decode_half, encode_half, pack, unpack
from .codec_tables import TableCodec
from .coding_spec import Coding
from .room import Room


def make_codec(coding: Coding) -> Codec:
    """The codec that stores coefficients as ``coding`` says."""
    kinds: dict[str, type[Codec]] = {"table": TableCodec, "int": IntCodec, "fp8": Fp8Codec, "plain": PlainCodec}
    return kinds[coding.kind](coding)


class PlainCodec(Codec):
    """The numbers themselves, in the dtype that the model computes in."""

    def encode(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        return x

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the numbers, which a reader may turn in place."""
        return rows.to(dtype, copy=True)

    def read(self, rows: Tensor, dtype: torch.dtype, room: Room) -> Tensor:
        """The same in float32 or finer."""
        return self.decode(rows, torch.promote_types(dtype, torch.float32))


class _ScaledCodec(Codec):
    """A grid, with a scale per token and block, as engines' own cache types have it."""

    top: float  # the largest number of the grid

    def encode(self, x: Tensor) -> Tensor:
        blocks = self._blocks(x.float())
        scales = encode_half((blocks.abs().amax(-1) / self.top).clamp(min=FLOAT16_TINY))
        scaled = (blocks / scales.view(torch.float16).float()[..., None]).clamp(-self.top, self.top)
        return torch.cat([scales, self._pack(scaled.flatten(-2)[..., : self.width])], -1)

    def _read(self, columns: Tensor, x: Tensor, dtype: torch.dtype, room: Room) -> None:
        scale_bytes = self.row_bytes - self._code_bytes
        scales = decode_half(columns[:scale_bytes]).float()
        block = self.coding.block or self.width
        found = self._unpack(columns[scale_bytes:], room).mul_(scales.repeat_interleave(block, 0)[: self.width])
        x.copy_(found.view(self.width, len(x), -1).transpose(0, 1))

    @property
    def _code_bytes(self) -> int:
        return -(-self.coding.code_bits // 8)

    def _blocks(self, x: Tensor) -> Tensor:
        """[..., width] as [..., blocks, block], filled up with zeros."""
        block = self.coding.block or self.width
        return nn.functional.pad(x, (0, -self.width % block)).unflatten(-1, (-1, block))

    def _pack(self, scaled: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self, codes: Tensor, room: Room) -> Tensor:
        raise NotImplementedError


class IntCodec(_ScaledCodec):
    """Symmetric integers of 8 or 4 bits."""

    def __init__(self, coding: Coding) -> None:
        super().__init__(coding)
        self.bits = coding.bits[0][0]
        self.top = 2.0 ** (self.bits - 1) - 1

    def _pack(self, scaled: Tensor) -> Tensor:
        return pack((scaled.round() + 2 ** (self.bits - 1)).to(torch.uint8), self.bits)

    def _unpack(self, codes: Tensor, room: Room) -> Tensor:
        return unpack(codes, self.bits, room)[: self.width].float().sub_(2 ** (self.bits - 1))


class Fp8Codec(_ScaledCodec):
    """Floating point of 8 bits: e4m3."""

    top = torch.finfo(torch.float8_e4m3fn).max

    def _pack(self, scaled: Tensor) -> Tensor:
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)

    def _unpack(self, codes: Tensor, room: Room) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

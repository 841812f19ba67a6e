"""Rope channels: which complex numbers of the keys keep their rotation (docs/mathematics.md, 'Rope channels').

Shapes: G kv heads, P = d/2 rope pairs, K channels, H query heads.
With z_f(t) in C^G the pair of frequency f of every kv head, channel j is s_j = sum_g encode[j,g] z_{f_j,g}, turns with
theta_{f_j}, and gives kv head g back the part decode[j,g] s_j of its pair f_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anymla.calibration.moments import Moments


@dataclass(frozen=True)
class Channels:
    """K rope channels: index [K] of their frequencies, encode and decode [K,G] complex128."""

    index: Tensor
    encode: Tensor
    decode: Tensor

    def encoder(self, pairs: int) -> Tensor:
        """The real matrix [2K, Gd] that takes half-split keys of all kv heads to half-split channels."""
        matrix = torch.zeros(
            len(self.index), self.encode.shape[1], pairs, dtype=self.encode.dtype, device=self.encode.device
        )
        matrix[torch.arange(len(self.index)), :, self.index] = self.encode
        return _real_matrix(matrix.flatten(1), pairs)

    def remainder(self, pairs: int) -> Tensor:
        """The real matrix [Gd, Gd] that leaves of half-split keys what no channel carries."""
        kv_heads = self.encode.shape[1]
        matrix = torch.eye(kv_heads, dtype=self.encode.dtype, device=self.encode.device)[:, None, :, None]
        matrix = matrix * torch.eye(pairs, dtype=self.encode.dtype, device=self.encode.device)[None, :, None, :]
        for frequency, encode, decode in zip(self.index.tolist(), self.encode, self.decode, strict=True):
            matrix[:, frequency, :, frequency] -= decode[:, None] * encode[None, :]
        size = kv_heads * pairs
        full = _real_matrix(matrix.reshape(size, size), pairs)  # rows: all real parts, then all imaginary parts
        return full.view(2, kv_heads, pairs, -1).transpose(0, 1).reshape(2 * size, 2 * size)


def _real_matrix(matrix: Tensor, pairs: int) -> Tensor:
    """Complex [M, G P] as real [2M, G 2P]: rows all real then all imaginary, columns half-split within each kv head."""
    shape = (matrix.shape[0], matrix.shape[1] // pairs, pairs)
    real, imag = matrix.real.reshape(shape), matrix.imag.reshape(shape)
    upper, lower = torch.cat([real, -imag], dim=-1), torch.cat([imag, real], dim=-1)
    return torch.cat([upper.flatten(1), lower.flatten(1)])


class RopeChoice(Protocol):
    """Chooses the channels of one layer."""

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        """``rope_dims`` = 2K rotated numbers in the cache, over all kv heads."""
        ...


def per_head_channels(frequencies: Tensor, pairs: int) -> Channels:
    """Channels that are single pairs of single kv heads: ``frequencies`` [G, k] of each head (MHA2MLA's layout)."""
    kv_heads, kept = frequencies.shape
    one_hot = torch.eye(kv_heads, dtype=torch.complex128, device=frequencies.device).repeat_interleave(kept, dim=0)
    return Channels(index=frequencies.flatten(), encode=one_hot, decode=one_hot)

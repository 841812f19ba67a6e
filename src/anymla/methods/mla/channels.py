"""Rope channels: which complex numbers of the keys keep their rotation (docs/mathematics.md, 'Rope channels').

Shapes: G kv heads of d dims, P rope pairs in each (the rest of a head is not rotated), K channels, H query heads.
z_f(t) in C^G is the pair of frequency f of every kv head. Channel j is s_j = sum_g encode[j,g] z_{f_j,g}. It rotates
with theta_{f_j}, and gives kv head g back the part decode[j,g] s_j of its pair f_j. A channel may be folded over m
frequencies that are treated as equal (TransMLA). It then has m entries, j, j + K, .., and rotates with the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class Channels:
    """K channels of ``fold`` entries each: index [fold K] of frequencies, encode and decode [fold K,G] complex128."""

    index: Tensor
    encode: Tensor
    decode: Tensor
    fold: int = 1

    def __len__(self) -> int:
        return len(self.index) // self.fold

    def encoder(self, pairs: int, head_dim: int) -> Tensor:
        """The real matrix [2K, G d] that takes half-split keys of all kv heads to half-split channels."""
        matrix = torch.zeros(
            len(self.index), self.encode.shape[1], pairs, dtype=self.encode.dtype, device=self.encode.device
        )
        matrix[torch.arange(len(self.index), device=matrix.device), :, self.index] = self.encode
        matrix = matrix.view(self.fold, len(self), *matrix.shape[1:]).sum(0)
        rotated = _real_matrix(matrix.flatten(1), pairs).unflatten(1, (self.encode.shape[1], 2 * pairs))
        return torch.nn.functional.pad(rotated, (0, head_dim - 2 * pairs)).flatten(1)

    def remainder(self, pairs: int, head_dim: int) -> Tensor:
        """The real matrix [G d, G d] that leaves of half-split keys what no channel carries."""
        kv_heads = self.encode.shape[1]
        matrix = torch.eye(kv_heads, dtype=self.encode.dtype, device=self.encode.device)[:, None, :, None]
        matrix = matrix * torch.eye(pairs, dtype=self.encode.dtype, device=self.encode.device)[None, :, None, :]
        index = self.index.tolist()
        for written in range(len(index)):
            for read in range(written % len(self), len(index), len(self)):  # entries of the same channel
                matrix[:, index[written], :, index[read]] -= torch.outer(self.decode[written], self.encode[read])
        size = kv_heads * pairs
        rotated = _real_matrix(matrix.reshape(size, size), pairs)  # rows: all real parts, then all imaginary parts
        rotated = rotated.view(2, kv_heads, pairs, kv_heads, 2 * pairs).transpose(0, 1).flatten(1, 2)  # [G,2P,G,2P]
        full = torch.eye(kv_heads * head_dim, dtype=rotated.dtype, device=rotated.device)
        full.view(kv_heads, head_dim, kv_heads, head_dim)[:, : 2 * pairs, :, : 2 * pairs] = rotated
        return full


def _real_matrix(matrix: Tensor, pairs: int) -> Tensor:
    """Complex [M, G P] as real [2M, G 2P]: rows all real then all imaginary, columns half-split within each kv head."""
    shape = (matrix.shape[0], matrix.shape[1] // max(pairs, 1), pairs)
    real, imag = matrix.real.reshape(shape), matrix.imag.reshape(shape)
    upper, lower = torch.cat([real, -imag], dim=-1), torch.cat([imag, real], dim=-1)
    return torch.cat([upper.flatten(1), lower.flatten(1)])


def no_channels(moments: Moments) -> Channels:
    """Nothing stays rotated."""
    none = moments.gram.new_zeros(0, len(moments.key_norm), dtype=torch.complex128)
    return Channels(index=none.new_zeros(0, dtype=torch.long), encode=none, decode=none)


def spread(pairs: int, channels: int) -> Tensor:
    """Frequencies [K] in rising order: all of them as often as K allows, the rest evenly spaced."""
    times, left = divmod(channels, pairs)
    everywhere, some = torch.arange(pairs).repeat(times), torch.arange(left) * pairs // max(left, 1)
    return torch.cat([everywhere, some]).sort().values


def per_head_channels(frequencies: Tensor, pairs: int) -> Channels:
    """Channels that are single pairs of single kv heads: ``frequencies`` [G, k] of each head (MHA2MLA's layout)."""
    kv_heads, kept = frequencies.shape
    one_hot = torch.eye(kv_heads, dtype=torch.complex128, device=frequencies.device).repeat_interleave(kept, dim=0)
    return Channels(index=frequencies.flatten(), encode=one_hot, decode=one_hot)

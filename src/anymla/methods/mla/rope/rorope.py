"""All rotation in one shared key head (TransMLA, arXiv 2502.07864, RoRoPE and FreqFold)."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from anymla.methods.mla.moments import Moments
from anymla.methods.mla.rope.channels import Channels, spread


@dataclass(frozen=True)
class RoRoPE:
    """Real principal components of the keys across kv heads, the same for real and imaginary parts.

    K channels turn with a regular grid of the P frequencies, floor(i P / K): TransMLA's collapse to 2K dims. ``fold``
    adjacent frequencies are taken for equal (FreqFold): the components then are of fold G pairs, and those of one fold
    go, the largest first, to the grid's frequencies in it. A fold that does not divide P becomes the largest part of it
    that does. More channels than one head has (K > P) are beyond TransMLA: further components within each frequency,
    nothing folded, all of them exact.
    """

    fold: int = 1

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        kv_heads, pairs = moments.key_norm.shape
        turns = spread(pairs, rope_dims // 2).to(moments.gram.device)
        folded = len(turns) <= pairs and len(turns) < kv_heads * pairs
        fold = gcd(self.fold, pairs) if folded else 1
        axes = _principal_axes(moments, pairs, fold)
        own, place = turns // fold, turns % fold
        component = torch.arange(len(turns), device=turns.device) - torch.searchsorted(own, own)
        entry = torch.arange(fold, device=turns.device)[:, None]
        pair = (place + entry) % fold  # the first entry is the pair that the channel turns with
        vectors = axes[own[None], :, pair, component[None]].flatten(0, 1)  # [fold K,G]
        vectors = vectors.to(torch.complex128)
        return Channels(index=(own * fold + pair).flatten(), encode=vectors, decode=vectors, fold=fold)


def _principal_axes(moments: Moments, pairs: int, fold: int) -> Tensor:
    """Eigenvectors [P/fold, G, fold, G fold] of E[k k^T] over the pairs of each fold, the largest first."""
    kv_heads, d = moments.key_norm.shape[0], moments.query_gram.shape[-1]
    gram = moments.gram[: kv_heads * d, : kv_heads * d].view(kv_heads, d, kv_heads, d)
    shape = (kv_heads, 2, pairs // fold, fold)
    gram = gram[:, : 2 * pairs, :, : 2 * pairs].reshape(*shape, *shape)
    blocks = torch.einsum("grcmhrcn->cgmhn", gram).flatten(3).flatten(1, 2)  # real and imaginary parts together
    vectors: Tensor = torch.linalg.eigh(blocks).eigenvectors.flip(-1)
    return vectors.view(pairs // fold, kv_heads, fold, -1)

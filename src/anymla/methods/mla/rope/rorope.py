"""All rotation in one shared key head (TransMLA, arXiv 2502.07864, RoRoPE and FreqFold)."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.papers import TRANSMLA
from anymla.methods.mla.rope.choice import RopeChoice

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class RoRoPE(RopeChoice):
    """Real principal components of the keys across kv heads, the same for real and imaginary parts.

    K channels rotate with a regular grid of the P frequencies, floor(i P / K): TransMLA's collapse to 2K dims. ``fold``
    adjacent frequencies are treated as equal (FreqFold). The components are then of fold G pairs. Those of one fold go
    to the grid's frequencies in it, the largest first. A fold that does not divide P becomes its largest divisor that
    does. TransMLA has no more channels than one head has. More (K > P) are further components within each frequency,
    without folds. All of them together are exact.
    """

    name: ClassVar[str] = "rorope"
    paper: ClassVar[Paper] = TRANSMLA
    summary: ClassVar[str] = "principal components of keys across heads, on a regular grid of frequencies"
    shared: ClassVar[bool] = True

    fold: int = 1

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        import torch

        from anymla.methods.mla.channels import Channels, spread

        kv_heads, pairs = moments.key_norm.shape
        chosen = spread(pairs, rope_dims // 2).to(moments.gram.device)
        folded = len(chosen) <= pairs and len(chosen) < kv_heads * pairs
        fold = gcd(self.fold, pairs) if folded else 1
        axes = _principal_axes(moments, pairs, fold)
        own, place = chosen // fold, chosen % fold
        component = torch.arange(len(chosen), device=chosen.device) - torch.searchsorted(own, own)
        entry = torch.arange(fold, device=chosen.device)[:, None]
        pair = (place + entry) % fold  # the first entry is the pair that the channel rotates with
        vectors = axes[own[None], :, pair, component[None]].flatten(0, 1)  # [fold K,G]
        vectors = vectors.to(torch.complex128)
        return Channels(index=(own * fold + pair).flatten(), encode=vectors, decode=vectors, fold=fold)


@dataclass(frozen=True)
class FreqFold2(RoRoPE):
    """RoRoPE with 2 adjacent frequencies taken for equal."""

    name: ClassVar[str] = "freqfold-2"
    summary: ClassVar[str] = "RoRoPE with 2 frequencies taken for equal"

    fold: int = 2


@dataclass(frozen=True)
class FreqFold4(RoRoPE):
    """RoRoPE with 4 adjacent frequencies taken for equal."""

    name: ClassVar[str] = "freqfold-4"
    summary: ClassVar[str] = "RoRoPE with 4 frequencies taken for equal"

    fold: int = 4


@dataclass(frozen=True)
class FreqFold8(RoRoPE):
    """RoRoPE with 8 adjacent frequencies taken for equal."""

    name: ClassVar[str] = "freqfold-8"
    summary: ClassVar[str] = "RoRoPE with 8 frequencies taken for equal"

    fold: int = 8


@dataclass(frozen=True)
class FreqFold16(RoRoPE):
    """RoRoPE with 16 adjacent frequencies taken for equal."""

    name: ClassVar[str] = "freqfold-16"
    summary: ClassVar[str] = "RoRoPE with 16 frequencies taken for equal"

    fold: int = 16


def _principal_axes(moments: Moments, pairs: int, fold: int) -> Tensor:
    """Eigenvectors [P/fold, G, fold, G fold] of E[k k^T] over the pairs of each fold, the largest first."""
    import torch

    kv_heads, d = moments.key_norm.shape[0], moments.query_gram.shape[-1]
    gram = moments.gram[: kv_heads * d, : kv_heads * d].view(kv_heads, d, kv_heads, d)
    shape = (kv_heads, 2, pairs // fold, fold)
    gram = gram[:, : 2 * pairs, :, : 2 * pairs].reshape(*shape, *shape)
    blocks = torch.einsum("grcmhrcn->cgmhn", gram).flatten(3).flatten(1, 2)  # real and imaginary parts together
    vectors: Tensor = torch.linalg.eigh(blocks).eigenvectors.flip(-1)
    return vectors.view(pairs // fold, kv_heads, fold, -1)

"""The low-rank latent: what a factorisation gets and gives (docs/mathematics.md, 'The latent').

Shapes: G kv heads, d head_dim, r latent rank. y = [k_rest ; v], 2Gd numbers: the keys less what rope channels carry,
and the values. A factorisation approximates y by decoder @ encoder @ y + offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentProblem:
    """The statistics of y, float64.

    weight_gram, gram, weighted_gram [2Gd,2Gd]: W W^T of the projection that makes y; E[y y^T]; the same with tokens
    weighted by the attention they receive, whose mean is weighted_mean [2Gd]. key_metric, value_metric [G,d,d]: how
    much an error of a kv head's key or value damages the layer's output.
    """

    weight_gram: Tensor
    gram: Tensor
    weighted_gram: Tensor
    weighted_mean: Tensor
    key_metric: Tensor
    value_metric: Tensor

    @property
    def key_size(self) -> int:
        """Gd, the length of the key part of y."""
        return self.key_metric.shape[0] * self.key_metric.shape[1]


@dataclass(frozen=True)
class Latent:
    """encoder [r, 2Gd], decoder [2Gd, r], mean [2Gd]: y ~ mean + decoder @ encoder @ (y - mean)."""

    encoder: Tensor
    decoder: Tensor
    mean: Tensor


class Factorization(Protocol):
    """Finds a rank-r latent of y; ``refits_output`` says whether W_o is then fitted to the original's output."""

    refits_output: ClassVar[bool]

    def __call__(self, problem: LatentProblem, rank: int) -> Latent: ...


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors of a symmetric matrix, as columns, the largest first."""
    vectors: Tensor = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors
    return vectors.flip(1)[:, :rank]


def projection(vectors: Tensor, scale: Tensor | None = None) -> Latent:
    """The uncentred latent U^T S, S^-1 U of orthonormal columns U [2Gd,r] and a diagonal scale S [2Gd]."""
    scale = torch.ones_like(vectors[:, 0]) if scale is None else scale
    return Latent(vectors.T * scale, vectors / scale[:, None], torch.zeros_like(scale))

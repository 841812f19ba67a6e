"""Least damage to the layer's output (anymla; DESIGN section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anymla.factorization.latent import Latent, LatentProblem, top_eigenvectors


@dataclass(frozen=True)
class OutputAware:
    """Minimises E || M^{1/2} (y - y~) ||^2 over rank-r y~, y centred, tokens weighted by the attention they receive.

    With U the top eigenvectors of M^{1/2} Cov(y) M^{1/2}: encoder U^T M^{1/2}, decoder M^{-1/2} U. A constant in k_rest
    adds the same number to every score of a row, and the mean of v comes back as an output bias, so means cost no rank.
    """

    metric_floor: float = 1e-4  # smallest eigenvalue of a metric block, as a share of its largest

    refits_output: ClassVar[bool] = True

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        mean = problem.weighted_mean
        covariance = problem.weighted_gram - torch.outer(mean, mean)
        roots = [self._roots(block) for block in (*problem.key_metric, *problem.value_metric)]
        root = torch.block_diag(*(pair[0] for pair in roots))
        inverse = torch.block_diag(*(pair[1] for pair in roots))
        vectors = top_eigenvectors(root @ covariance @ root, rank)
        encoder, decoder = vectors.T @ root, inverse @ vectors
        size = encoder.norm(dim=1)  # unit rows: latents of one size suit 16-bit and quantised caches
        return Latent(encoder / size[:, None], decoder * size, mean)

    def _roots(self, block: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((block + block.T) / 2)
        largest = values[-1]
        values = values.clamp_min(self.metric_floor * largest) if largest > 0 else torch.ones_like(values)
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

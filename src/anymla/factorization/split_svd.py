"""Separate truncated SVDs of key and value weights (MHA2MLA, arXiv 2502.14837, section 3.2, SVD_split)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from anymla.factorization.latent import Latent, LatentProblem, projection, top_eigenvectors


@dataclass(frozen=True)
class SplitSVD:
    """One latent for keys and one for values, ranks as equal as they can be (the values get an odd one)."""

    refits_output: ClassVar[bool] = False

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        size = problem.key_size
        key_rank = max(min(rank // 2, size), rank - size)
        keys = top_eigenvectors(problem.weight_gram[:size, :size], key_rank)
        values = top_eigenvectors(problem.weight_gram[size:, size:], rank - key_rank)
        return projection(torch.block_diag(keys, values))

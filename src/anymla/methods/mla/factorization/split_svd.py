"""Separate truncated SVDs of key and value weights (MHA2MLA, arXiv 2502.14837, section 3.2, SVD_split)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from anymla.methods.mla.factorization.latent import Latent, LatentProblem, top_eigenvectors


@dataclass(frozen=True)
class SplitSVD:
    """One latent for keys and one for values, of equal rank; the values get what the keys have no use for."""

    refits_output: ClassVar[bool] = False

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        size = problem.key_size
        key_gram = problem.weight_gram[:size, :size]
        floor = 1e-12 * problem.weight_gram.trace().item()
        useful = int(torch.linalg.matrix_rank(key_gram, atol=floor, hermitian=True))
        key_rank = max(min(rank // 2, useful), rank - size)
        keys = top_eigenvectors(key_gram, key_rank)
        values = top_eigenvectors(problem.weight_gram[size:, size:], rank - key_rank)
        vectors = torch.block_diag(keys, values)
        return Latent(vectors.T, vectors, problem.bias)

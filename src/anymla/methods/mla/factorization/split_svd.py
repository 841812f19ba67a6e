"""Separate truncated SVDs of key and value weights (MHA2MLA, arXiv 2502.14837, section 3.2, SVD_split)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.factorization.choice import Factorization
from anymla.methods.mla.papers import MHA2MLA

if TYPE_CHECKING:
    from anymla.methods.mla.latent import Latent, LatentProblem


@dataclass(frozen=True)
class SplitSVD(Factorization):
    """One latent for keys and one for values, of equal rank; the values get what the keys have no use for."""

    name: ClassVar[str] = "split-svd"
    paper: ClassVar[Paper] = MHA2MLA
    summary: ClassVar[str] = "one SVD of the key weights and one of the value weights"

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        import torch

        from anymla.methods.mla.latent import Latent, top_eigenvectors

        size = problem.key_size
        key_gram = problem.weight_gram[:size, :size]
        floor = 1e-12 * problem.weight_gram.trace().item()
        useful = int(torch.linalg.matrix_rank(key_gram, atol=floor, hermitian=True))
        key_rank = max(min(rank // 2, useful), rank - size)
        keys = top_eigenvectors(key_gram, key_rank)
        values = top_eigenvectors(problem.weight_gram[size:, size:], rank - key_rank)
        vectors = torch.block_diag(keys, values)
        return Latent(vectors.T, vectors, problem.bias)

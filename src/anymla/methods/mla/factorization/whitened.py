"""Truncation in the metric of the data (SVD-LLM, arXiv 2403.07378; CARE, arXiv 2603.17946 as used for MLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.factorization.choice import Factorization

if TYPE_CHECKING:
    from anymla.methods.mla.latent import Latent, LatentProblem


@dataclass(frozen=True)
class Whitened(Factorization):
    """SVD of W C^{1/2}, C = E[x x^T], truncated, times C^{-1/2}.

    Its left vectors are the eigenvectors of W C W^T, the moments of y minus its bias. The result is U_r U_r^T W, so no
    inverse is needed. Biases stay outside, exact.
    """

    name: ClassVar[str] = "whitened"
    paper: ClassVar[Paper] = Paper(title="SVD-LLM", arxiv="2403.07378")
    summary: ClassVar[str] = "SVD in the metric of the data"

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        from anymla.methods.mla.latent import Latent, top_eigenvectors

        vectors = top_eigenvectors(problem.unbiased_gram, rank)
        return Latent(vectors.T, vectors, problem.bias)

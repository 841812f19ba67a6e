"""Joint truncated SVD of the stacked key and value weights (MHA2MLA, arXiv 2502.14837, section 3.2, SVD_joint)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anymla.methods.mla.factorization.latent import Latent, LatentProblem, top_eigenvectors


@dataclass(frozen=True)
class JointSVD:
    """[W_k,nope ; W_v] ~ U_r U_r^T [W_k,nope ; W_v]: the best rank r of the weights, whatever the data.

    Biases stay outside the SVD, exact. With a key norm there is no linear W_k from x to the key; its rows times the
    norm's gain stand for it.
    """

    refits_output: ClassVar[bool] = False

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        vectors = top_eigenvectors(problem.weight_gram, rank)
        return Latent(vectors.T, vectors, problem.bias)

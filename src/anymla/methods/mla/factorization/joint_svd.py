"""Joint truncated SVD of the stacked key and value weights (MHA2MLA, arXiv 2502.14837, section 3.2, SVD_joint)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.factorization.choice import Factorization
from anymla.methods.mla.papers import MHA2MLA

if TYPE_CHECKING:
    from anymla.methods.mla.latent import Latent, LatentProblem


@dataclass(frozen=True)
class JointSVD(Factorization):
    """[W_k,nope ; W_v] ~ U_r U_r^T [W_k,nope ; W_v]: the best rank r of the weights, whatever the data.

    Biases stay outside the SVD, exact. With a key norm there is no linear W_k from x to the key; its rows times the
    norm's gain stand for it.
    """

    name: ClassVar[str] = "joint-svd"
    paper: ClassVar[Paper] = MHA2MLA
    summary: ClassVar[str] = "one SVD of the stacked key and value weights"

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        from anymla.methods.mla.latent import Latent, top_eigenvectors

        vectors = top_eigenvectors(problem.weight_gram, rank)
        return Latent(vectors.T, vectors, problem.bias)

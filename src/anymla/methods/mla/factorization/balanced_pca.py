"""Principal components of keys and values brought to equal size (TransMLA, arXiv 2502.07864, balanced KV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.factorization.choice import Factorization
from anymla.methods.mla.papers import TRANSMLA

if TYPE_CHECKING:
    from anymla.methods.mla.latent import Latent, LatentProblem


@dataclass(frozen=True)
class BalancedPCA(Factorization):
    """PCA of [k_rest / ratio ; v], ratio = mean norm of k_rest's rows over that of v's; biases ride along."""

    name: ClassVar[str] = "balanced-pca"
    paper: ClassVar[Paper] = TRANSMLA
    summary: ClassVar[str] = "principal components of keys and values brought to equal size"

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        import torch

        from anymla.methods.mla.latent import Latent, top_eigenvectors

        power = problem.gram.diagonal()
        floor = 1e-12 * power.max()
        keys, values = power[: problem.key_size], power[problem.key_size :]
        kept = keys[keys > floor]  # rows that rope channels took are not there any more
        scale = torch.ones_like(power)
        if len(kept):
            scale[: problem.key_size] = values.sqrt().mean() / kept.sqrt().mean()
        vectors = top_eigenvectors(problem.gram * scale[:, None] * scale, rank)
        return Latent(vectors.T * scale, vectors / scale[:, None], torch.zeros_like(scale))

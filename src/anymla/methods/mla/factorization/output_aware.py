"""Least damage to the layer's output (anymla; docs/mathematics.md, 'The latent')."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.factorization.choice import Factorization
from anymla.methods.mla.papers import OWN

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.methods.mla.latent import Latent, LatentProblem


@dataclass(frozen=True)
class OutputAware(Factorization):
    """Minimises E || M^{1/2} (y - y~) ||^2 over rank-r y~, y centred, tokens weighted by the attention they receive.

    With U the top eigenvectors of M^{1/2} Cov(y) M^{1/2}, the encoder is U^T M^{1/2} and the decoder M^{-1/2} U. Means
    cost no rank. A constant in k_rest adds one number to all scores of a row. The mean of v returns as an output bias.
    """

    name: ClassVar[str] = "output-aware"
    paper: ClassVar[Paper] = OWN
    summary: ClassVar[str] = "what the layer's output needs most"
    refits_output: ClassVar[bool] = True

    metric_floor: float = 1e-4  # smallest eigenvalue of a metric block, as a share of its largest

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        from anymla.methods.mla.latent import Latent, blockwise, top_eigenvectors

        root, inverse = self.roots(problem.metric)
        vectors = top_eigenvectors(self.seen(problem, root), rank)
        encoder, decoder = blockwise(root, vectors).T, blockwise(inverse, vectors)
        size = encoder.norm(dim=1)  # unit rows: latents of one size suit 16-bit and quantised caches
        return Latent(encoder / size[:, None], decoder * size, problem.weighted_mean)

    def energies(self, problem: LatentProblem) -> Tensor:
        """What each of the latent's axes [2Gd] adds to the layer's output, squared, summed over heads; falling."""
        import torch

        seen = self.seen(problem, self.roots(problem.metric)[0])
        found: Tensor = torch.linalg.eigvalsh(seen).flip(0).clamp_min(0)
        return found

    def seen(self, problem: LatentProblem, root: Tensor) -> Tensor:
        """M^{1/2} Cov(y) M^{1/2} [2Gd,2Gd]."""
        import torch

        from anymla.methods.mla.latent import blockwise

        covariance = torch.addr(problem.weighted_gram, problem.weighted_mean, problem.weighted_mean, alpha=-1)
        return blockwise(root, blockwise(root, covariance).T)

    def roots(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """M^{1/2} and M^{-1/2}, block by block; small eigenvalues are raised so that the inverse stays tame."""
        import torch

        values, vectors = torch.linalg.eigh((blocks + blocks.transpose(1, 2)) / 2)
        values = values.clamp_min(0)
        values = values.maximum(self.metric_floor * values[:, -1:])
        values = torch.where(values > 0, values, 1.0)  # a head that nothing reads
        root = values.sqrt().unsqueeze(1)
        return (vectors * root) @ vectors.transpose(1, 2), (vectors / root) @ vectors.transpose(1, 2)

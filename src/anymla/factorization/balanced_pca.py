"""Principal components of keys and values brought to equal size (TransMLA, arXiv 2502.07864, balanced KV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from anymla.factorization.latent import Latent, LatentProblem, projection, top_eigenvectors


@dataclass(frozen=True)
class BalancedPCA:
    """PCA of [k_rest / ratio ; v], ratio = mean column norm of k_rest over that of v on calibration text."""

    refits_output: ClassVar[bool] = False

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        power = problem.gram.diagonal()
        keys, values = power[: problem.key_size].sqrt().mean(), power[problem.key_size :].sqrt().mean()
        ratio = keys / values if keys > 1e-9 * values else torch.ones_like(keys)
        scale = torch.ones_like(power)
        scale[: problem.key_size] /= ratio
        return projection(top_eigenvectors(problem.gram * scale[:, None] * scale, rank), scale)

"""How much two layers' outputs tell of each other: diffusion maps and NPIB (MKA, arXiv 2406.16330, section 3).

Shapes: n points (last tokens' states) of D numbers; their coordinates in a diffusion map [n,2].
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.5  # of the normalisation by density
INFORMED, SPREAD = 5, 50  # nearest neighbours that mutual information and entropy look at
LEAST_ENTROPY = 1e-3  # below zero; that of evenly spread ranks is about -1.1
PAPER_WIDTH = 8.0  # sigma in the authors' code


def similarity(first: Tensor, second: Tensor, kernel: str = "gaussian") -> float:
    """NPIB of the outputs [n,D] of two layers: mutual information over the geometric mean of both entropies."""
    maps = [ranks(diffusion_map(points.double(), kernel)) for points in (first, second)]
    information = torch.stack([mutual_information(x, y) for x in maps[0].T for y in maps[1].T]).mean()
    return (information / (entropy(maps[0]) * entropy(maps[1])).sqrt()).item()


def diffusion_map(points: Tensor, kernel: str = "gaussian") -> Tensor:
    """The first two diffusion coordinates [n,2] of ``points`` [n,D].

    Args:
        points: one state per calibration window.
        kernel: gaussian: exp(-(distance / median)^2); sqrt: exp(-(distance / 8)^0.5), as in the authors' code.
    """
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if kernel == "sqrt":
        affinity = (-(distances / PAPER_WIDTH).sqrt()).exp()
    else:
        apart = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
        affinity = (-(distances / distances[apart].median().clamp_min(1e-300)).square()).exp()
    density = affinity.sum(0)
    affinity = affinity / torch.outer(density, density) ** ALPHA
    degree = affinity.sum(0).sqrt()
    axes: Tensor = torch.linalg.eigh(affinity / torch.outer(degree, degree)).eigenvectors.flip(1)
    return axes[:, 1:3] / axes[:, :1]


def ranks(coordinates: Tensor) -> Tensor:
    """Each coordinate [n,2] by its rank, from 0 to 1."""
    return coordinates.argsort(0).argsort(0).double() / (len(coordinates) - 1)


def mutual_information(x: Tensor, y: Tensor) -> Tensor:
    """That of two coordinates [n], in nats, by nearest neighbours (Kraskov et al. 2004, first estimator)."""
    count = len(x)
    apart = [(values[:, None] - values[None]).abs().fill_diagonal_(torch.inf) for values in (x, y)]
    neighbours = min(INFORMED, count - 1)
    radius = torch.maximum(*apart).kthvalue(neighbours, dim=1).values[:, None]
    inside = [torch.digamma((each < radius).sum(1) + 1.0).mean() for each in apart]
    constants = torch.digamma(torch.tensor([float(count), float(neighbours)], dtype=torch.float64)).sum()
    return (constants.to(x.device) - inside[0] - inside[1]).clamp_min(0)


def entropy(coordinates: Tensor) -> Tensor:
    """That of points [n,2] by their k-th neighbours: the mean of log(n r^2 / k), kept below zero."""
    count = len(coordinates)
    neighbours = min(SPREAD, count // 2)
    distances = torch.cdist(coordinates, coordinates).fill_diagonal_(torch.inf)
    radius = distances.kthvalue(neighbours, dim=1).values
    return (count * radius.square() / neighbours).log().mean().clamp_max(-LEAST_ENTROPY)

"""One matrix in two bits per weight and scales: salient columns, two groups of the others, compensation, in float64.

Shapes: O rows, I columns, b columns of a block, n blocks, S scales of a row and block, K thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.modeling.packed_linear import SALIENT, SECOND, levels_of

if TYPE_CHECKING:
    from anymla.methods.billm.settings import BiLLM

DAMPING = 0.01  # of the Hessian's mean diagonal
THRESHOLDS = torch.linspace(0.1, 0.9, 81, dtype=torch.float64)  # quantiles of magnitudes that may part the groups


@dataclass(frozen=True)
class Binarised:
    """What stands for a matrix: signs and second bits [O,I], salient columns [I], scales [S,O,n], values [O,I]."""

    signs: Tensor
    second: Tensor
    salient: Tensor
    scales: Tensor
    values: Tensor


def binarised(weight: Tensor, hessian: Tensor, settings: BiLLM, dtype: torch.dtype) -> Binarised:
    """Binarises ``weight`` [O,I] so that its products with inputs of this ``hessian`` [I,I] change little.

    Scales are rounded to ``dtype`` before anything is made up for. Float64 in and out.
    """
    weight, factor, width = weight.clone(), inverse_factor(hessian), settings.block_size
    blocks = []
    for start in range(0, weight.shape[1], width):
        part, behind = slice(start, start + width), slice(start + width, None)
        block = _block(weight[:, part], factor.diagonal()[part], settings, dtype)
        blocks.append(block)
        if settings.compensation != "none":
            lost, corner = weight[:, part] - block.values, factor[part, part]
            if settings.compensation == "columns":
                corner = corner.diagonal().diag()
            steps = torch.linalg.solve_triangular(corner, lost, upper=True, left=False)
            weight[:, behind] -= steps @ factor[part, behind]
    return Binarised(
        *(torch.cat([getattr(block, name) for block in blocks], -1) for name in ("signs", "second", "salient")),
        scales=torch.stack([block.scales for block in blocks], -1),
        values=torch.cat([block.values for block in blocks], -1),
    )


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U [I,I] with U^T U the inverse of the damped Hessian."""
    mean = hessian.diagonal().mean()
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (DAMPING * mean or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _block(weight: Tensor, spread: Tensor, settings: BiLLM, dtype: torch.dtype) -> Binarised:
    """One block [O,b]; ``spread`` [b]: the diagonal of the inverse's factor."""
    saliency = (weight / spread).square()
    searched = saliency if settings.search_on == "saliency" else weight
    salient = salient_columns(searched, saliency, settings)
    far = torch.zeros_like(weight, dtype=torch.bool)
    if settings.split and not salient.all():
        far[:, ~salient] = searched[:, ~salient].abs() >= threshold(searched[:, ~salient], means=settings.means)
    means, sizes = [], []
    signs, second = torch.zeros_like(far), far.clone()
    for group in (~far & ~salient, far & ~salient, salient.expand_as(far)):
        mean, size, above = _binary(weight, group, means=settings.means)
        signs |= above & group
        means.append(mean)
        sizes.append(size)
    rest = weight - means[-1] - sizes[-1] * torch.where(signs, 1.0, -1.0)
    mean, size, above = _binary(rest, salient.expand_as(far), means=settings.means)
    second |= above & salient
    means[-1] = means[-1] + mean
    numbers = [*sizes, size, *(means if settings.means else [])]
    scales = torch.stack(numbers).squeeze(-1).to(dtype)
    codes = signs.long() + SECOND * second + SALIENT * salient
    return Binarised(signs, second, salient, scales, levels_of(scales.double()).gather(-1, codes))


def _binary(values: Tensor, group: Tensor, *, means: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and size [O,1] of each row's values [O,b] in a group, and which values are above the mean."""
    count = group.sum(1, keepdim=True).clamp_min(1)
    mean = (values * group).sum(1, keepdim=True) / count * means
    centred = values - mean
    return mean, (centred.abs() * group).sum(1, keepdim=True) / count, centred >= 0


def salient_columns(searched: Tensor, saliency: Tensor, settings: BiLLM) -> Tensor:
    """Which columns [b] are salient: as many of the first by ``saliency`` [O,b] as lose least of ``searched`` [O,b].

    In this search the other columns have two orders as well, as in the authors' code: with one the loss would fall with
    every further column.
    """
    order = saliency.sum(0).argsort(descending=True, stable=True)
    columns, most = searched[:, order], min(settings.most_salient, len(order))
    losses = [
        sum(_lost_twice(part, means=settings.means) for part in (columns[:, :count], columns[:, count:]))
        for count in range(1, most + 1)
    ]
    salient = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    if losses:
        salient[order[: losses.index(min(losses)) + 1]] = True
    return salient


def _lost_twice(values: Tensor, *, means: bool) -> float:
    """What is left of values [O,k], squared, once each row was binarised twice."""
    for _ in range(2 if values.shape[1] else 0):
        centred = values - values.mean(1, keepdim=True) if means else values
        values = centred - centred.abs().mean(1, keepdim=True).copysign(centred)
    return values.square().sum().item()


def threshold(values: Tensor, *, means: bool) -> Tensor:
    """The magnitude that parts values [O,b] into two groups, so that the least is lost when each row is binarised.

    A group of n values with mean m and mean distance a from it loses their squares less n (m^2 + a^2). With a row in
    order, a group is one range of it or two, and the sums are differences of running ones.
    """
    candidates = magnitudes(values)
    row, zero = values.sort(1).values, values.new_zeros(len(values), 1)
    running = torch.cat([zero, row.cumsum(1)], 1)
    bounds = candidates.expand(len(row), -1).contiguous()
    first = torch.searchsorted(row, -bounds, right=True)  # values up to -p
    last = torch.searchsorted(row, bounds)  # and those below p
    start, end = torch.zeros_like(first), torch.full_like(last, row.shape[1])
    gain = _explained(row, running, ((first, last),), means=means)
    gain += _explained(row, running, ((start, first), (last, end)), means=means)
    return candidates[gain.sum(0).argmax()]


def magnitudes(values: Tensor) -> Tensor:
    """The magnitudes [K] among which a threshold is searched."""
    ordered = values.abs().flatten().sort().values
    return ordered[((len(ordered) - 1) * THRESHOLDS.to(ordered.device)).round().long()]


def _explained(row: Tensor, running: Tensor, ranges: tuple[tuple[Tensor, Tensor], ...], *, means: bool) -> Tensor:
    """n (m^2 + a^2) [O,K] of the group that ``ranges`` [O,K] of each ordered ``row`` [O,b] are together."""

    def total(start: Tensor, end: Tensor) -> Tensor:
        return running.gather(1, end) - running.gather(1, start)

    count = sum(end - start for start, end in ranges).clamp_min(1)  # type: ignore[union-attr]
    mean = sum(total(*bounds) for bounds in ranges) / count * means
    middle, distance = torch.searchsorted(row, mean), torch.zeros_like(mean)
    for start, end in ranges:
        at = middle.clamp(start, end)
        distance += (start + end - 2 * at).neg() * mean + total(at, end) - total(start, at)
    return count * mean.square() + distance.square() / count

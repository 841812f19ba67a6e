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
    from anymla.methods.billm.settings import BiLLM, Levels

ROWS = 256  # of a block, evenly spaced, on which its columns and its threshold are searched
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
        signs=torch.cat([block.signs for block in blocks], -1),
        second=torch.cat([block.second for block in blocks], -1),
        salient=torch.cat([block.salient for block in blocks]),
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
    saliency = saliency / saliency.mean().clamp_min(1e-300)
    searched = saliency if settings.search_on == "saliency" else weight
    sample = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).long()
    salient = salient_columns(searched[sample], saliency.sum(0), settings)
    far = torch.zeros_like(weight, dtype=torch.bool)
    if settings.split and not salient.all():
        others = searched[:, ~salient].abs()
        far[:, ~salient] = others >= threshold(searched[sample][:, ~salient], settings.levels)
    means, sizes = [], []
    signs, second = torch.zeros_like(far), far.clone()
    for group in (~far & ~salient, far & ~salient, salient.expand_as(far)):
        mean, size, above = _binary(weight, group, settings.levels)
        signs |= above & group
        means.append(mean)
        sizes.append(size)
    rest = weight - means[-1] - sizes[-1] * torch.where(signs, 1.0, -1.0)
    mean, size, above = _binary(rest, salient.expand_as(far), settings.levels)
    second |= above & salient
    means[-1] = means[-1] + mean
    numbers = [*sizes, size, *(means if settings.levels != "symmetric" else [])]
    scales = torch.stack(numbers).squeeze(-1).to(dtype)
    codes = signs.long() + SECOND * second + SALIENT * salient
    return Binarised(signs, second, salient, scales, levels_of(scales.double()).gather(-1, codes))


def _binary(values: Tensor, group: Tensor | None, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and size [O,1] of each row's values [O,b] in a group, and which values are above the mean.

    ``group`` [O,b]: None for all. The second moment of what is left is least for the levels that are the means of the
    values above the group's mean and of those below: "own".
    """

    def total(each: Tensor) -> Tensor:
        return (each if group is None else each * group).sum(1, keepdim=True)

    count = total(torch.ones_like(values)).clamp_min(1)
    mean = total(values) / count * (levels != "symmetric")
    centred = values - mean
    above, distance = centred >= 0, total(centred.abs())
    if levels != "own":
        return mean, distance / count, above
    upper = total(above.to(values.dtype))
    up, down = distance / 2 / upper.clamp_min(1), distance / 2 / (count - upper).clamp_min(1)
    return mean + (up - down) / 2, (up + down) / 2, above


def salient_columns(searched: Tensor, saliency: Tensor, settings: BiLLM) -> Tensor:
    """Which columns [b] are salient: as many of the first by ``saliency`` [b] as lose least of ``searched`` [O,b].

    In this search the other columns have two orders as well, as in the authors' code: with one the loss would fall with
    every further column. It is in float32, for it only compares.
    """
    order = saliency.argsort(descending=True, stable=True)
    columns, most = searched[:, order].float(), min(settings.most_salient, len(order))
    losses = [
        sum(_lost_twice(part, settings.levels) for part in (columns[:, :count], columns[:, count:]))
        for count in range(1, most + 1)
    ]
    salient = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    if losses:
        salient[order[: losses.index(min(losses)) + 1]] = True
    return salient


def _lost_twice(values: Tensor, levels: Levels) -> float:
    """What is left of values [O,k], squared, once each row was binarised twice."""
    for _ in range(2 if values.shape[1] else 0):
        mean, size, above = _binary(values, None, levels)
        values = values - torch.where(above, mean + size, mean - size)
    return values.square().sum().item()


def threshold(values: Tensor, levels: Levels) -> Tensor:
    """The magnitude that splits values [O,b] into two groups, so that binarising each row loses least.

    Let n values have the mean m, and distances from it that sum to a n. Of their squares, n (m^2 + a^2) are kept. If
    the k values above m have their own level, a^2 n^2 / (4 k (n - k)) replaces a^2. In a sorted row, a group is one
    range or two, and the sums are differences of running ones.
    """
    candidates = magnitudes(values)
    row, zero = values.sort(1).values, values.new_zeros(len(values), 1)
    running = torch.cat([zero, row.cumsum(1)], 1)
    bounds = candidates.expand(len(row), -1).contiguous()
    first = torch.searchsorted(row, -bounds, right=True)  # values up to -p
    last = torch.searchsorted(row, bounds)  # and those below p
    start, end = torch.zeros_like(first), torch.full_like(last, row.shape[1])
    gain = _explained(row, running, ((first, last),), levels)
    gain += _explained(row, running, ((start, first), (last, end)), levels)
    return candidates[gain.sum(0).argmax()]


def magnitudes(values: Tensor) -> Tensor:
    """The magnitudes [K] among which a threshold is searched."""
    ordered = values.abs().flatten().sort().values
    return ordered[((len(ordered) - 1) * THRESHOLDS.to(ordered.device)).round().long()]


def _explained(row: Tensor, running: Tensor, ranges: tuple[tuple[Tensor, Tensor], ...], levels: Levels) -> Tensor:
    """The squares [O,K] that are kept of the group that ``ranges`` [O,K] of each ordered ``row`` [O,b] are together."""

    def total(start: Tensor, end: Tensor) -> Tensor:
        return running.gather(1, end) - running.gather(1, start)

    count, mean = torch.zeros_like(ranges[0][0]), torch.zeros_like(row[:, :1]).expand_as(ranges[0][0])
    for start, end in ranges:
        count, mean = count + end - start, mean + total(start, end)
    mean = mean / count.clamp_min(1) * (levels != "symmetric")
    middle, distance, above = torch.searchsorted(row, mean), torch.zeros_like(mean), torch.zeros_like(count)
    for start, end in ranges:
        at = middle.clamp(start, end)
        distance += total(at, end) - total(start, at) - (start + end - 2 * at) * mean
        above += end - at
    kept = count * mean.square()
    if levels == "own":
        half = (distance / 2).square()
        return kept + half / above.clamp_min(1) + half / (count - above).clamp_min(1)
    return kept + distance.square() / count.clamp_min(1)

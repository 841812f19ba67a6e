"""Levels of a quantiser for every coefficient: least squared error on a sample of tokens.

Shapes: N tokens, C coefficients, k = 2**bits levels. All in float64, each coefficient by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymla.modeling.coding_spec import Coding

ITERATIONS = 50  # of Lloyd's
MOST_FITTED = 6  # bits; more levels need more tokens than a sample has, and are put evenly between those
FARTHER, SHARE = 2.0, 3e-2  # text of another kind has such a share of tokens, so many times as far out


def fit_tables(coefficients: Tensor, coding: Coding, weights: Tensor | None = None) -> dict[int, Tensor]:
    """Levels of all coefficients [N,C] that ``coding`` gives 1 to 8 bits, as a codec takes them.

    By bits, [coefficients of so many bits, 2**bits] in the coefficients' order. ``weights``: as of TableSample.
    """
    widths = torch.tensor([bits for bits, count in coding.bits for _ in range(count)])
    tables = {}
    for bits in sorted({*widths.tolist()} - {0, 16}):
        places = (widths == bits).nonzero()[:, 0].to(coefficients.device)
        of_these = None if weights is None else weights.expand_as(coefficients)[:, places]
        tables[bits] = TableSample(coefficients[:, places], of_these).fit(bits)
    return tables


def with_farther(coefficients: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A sample [N,C] and its weights [N,C]; and all of it again, farther from its mean and of little weight.

    A token that calibration text lacks may lie beyond the last level. Then more bits do not help it. Where there are
    many levels, a few of them out there cost little. Where there are few, such tokens hardly move them.
    """
    farther = torch.lerp(coefficients.mean(0), coefficients, FARTHER)
    return torch.cat([coefficients, farther]), torch.cat([weights, SHARE * weights])


class TableSample:
    """Coefficients [N,C] of tokens, sorted, with running sums: every cell of a quantiser is a difference of two.

    Args:
        coefficients: [N,C].
        weights: what a squared error costs, [N,C] or [N,1]; where it is 0, a number is left out. Default: ones.
    """

    def __init__(self, coefficients: Tensor, weights: Tensor | None = None) -> None:
        rows, order = coefficients.T.double().contiguous().sort(dim=-1, stable=True)
        self.rows = rows
        if weights is None:
            self.weights = torch.ones_like(rows)
        else:
            self.weights = weights.expand_as(coefficients).T.double().gather(-1, order)
        self.weight, self.sum = _running(self.weights), _running(self.weights * rows)

    def fit(self, bits: int) -> Tensor:
        """Levels [C,2**bits], rising: Lloyd's algorithm (Lloyd, 1982) from where they are dense enough."""
        if bits > MOST_FITTED:
            return _evenly_between(self.fit(MOST_FITTED), 2**bits)
        levels = self._start(2**bits)
        for _ in range(ITERATIONS):
            weight, total = self._cells(levels, self.weight, self.sum)
            moved = torch.where(weight > 0, total / weight, levels)
            if torch.equal(moved, levels):
                break
            levels = moved
        return levels.sort(dim=-1).values  # sums may round neighbours into the wrong order

    def _cells(self, levels: Tensor, *running: Tensor) -> tuple[Tensor, ...]:
        """Sums [C,k] over the numbers that are nearest to each level."""
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        inner = torch.searchsorted(self.rows, middles)
        bounds = pad(pad(inner, (1, 0)), (0, 1), value=self.rows.shape[-1])
        return tuple(sums.gather(-1, bounds).diff(dim=-1) for sums in running)

    def _start(self, count: int) -> Tensor:
        """Levels where their best density, the cube root of the numbers' own and of the weights, puts them.

        That is the best one for many levels (Panter and Dite, 1951). The gap g between neighbours stands for 1 over the
        density: each number counts g^(2/3). Quantiles instead leave the tails to a few levels, and Lloyd's algorithm
        takes hundreds of rounds to bring more of them there.
        """
        gaps = pad(self.rows.diff(dim=-1), (1, 1))
        shares = _running(((gaps[:, 1:] + gaps[:, :-1]) / 2).pow(2 / 3) * self.weights.pow(1 / 3))[:, 1:]
        steps = (torch.arange(count, dtype=torch.float64, device=shares.device) + 0.5) / count
        places = torch.searchsorted(shares.contiguous(), shares[:, -1:] * steps)
        return self.rows.gather(-1, places.clamp(max=self.rows.shape[-1] - 1))


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, .., N values of each row [C,N+1]."""
    return pad(values.cumsum(-1), (1, 0))


def _evenly_between(levels: Tensor, count: int) -> Tensor:
    """As many levels more [C,count], evenly between those of ``levels`` [C,k] and a little beyond the last."""
    given = levels.shape[-1]
    places = (torch.arange(count, dtype=levels.dtype, device=levels.device) + 0.5) / count * given - 0.5
    before = places.floor().long().clamp(0, given - 2)
    return torch.lerp(levels[:, before], levels[:, before + 1], (places - before).expand(len(levels), -1))

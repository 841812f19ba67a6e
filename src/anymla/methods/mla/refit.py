"""Least-squares refit of the output projection after a layer was converted (docs/mathematics.md, 'The refit')."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.distributed import all_sum, all_sum_number

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean feature power that hold the weight to where it was


@dataclass
class NormalEquations:
    """Sums for regressing an output error [N,D] on features [N,F]: X^T X, X^T E, ||E||^2."""

    gram: Tensor
    cross: Tensor
    error: float

    def error_of(self, change: Tensor) -> float:
        """||E - X change||^2."""
        return self.error - 2 * (change * self.cross).sum().item() + (change * (self.gram @ change)).sum().item()


@dataclass(frozen=True)
class OutputBatch:
    """What an output projection reads [..,F], and what its output lacks [..,D]."""

    features: Tensor
    lacking: Tensor


def normal_equations(batches: Iterable[OutputBatch], *, bias: bool = True) -> NormalEquations:
    """Accumulates ``batches`` in float64; with ``bias``, a constant feature is appended for it."""
    gram = cross = total = torch.zeros(())
    for batch in batches:
        x, e = batch.features.flatten(0, -2).double(), batch.lacking.flatten(0, -2).double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x
        gram, cross, total = x.T @ x + gram, x.T @ e + cross, e.square().sum() + total
    return NormalEquations(all_sum(gram), all_sum(cross), all_sum_number(float(total), gram.device))


def best_change(fit: NormalEquations, choice: NormalEquations, *, bias: bool = True) -> Tensor | None:
    """The ridge solution [F,D] of ``fit`` whose strength does best on ``choice``; None where none beats no change."""
    last = -1 if bias else len(fit.gram)
    power = fit.gram.diagonal()[:last].mean()
    if not power > 0:  # an attention that gives nothing
        return None
    penalty = torch.ones_like(fit.gram.diagonal()) * power
    penalty[last:] = 0  # the bias is free
    best, best_error = None, choice.error
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(fit.gram + torch.diag(ridge * penalty))
        change = torch.cholesky_solve(fit.cross, factor)
        if not failed and torch.isfinite(change).all() and (error := choice.error_of(change)) < best_error:
            best, best_error = change, error
    return best


def refit_output(
    attention: Any,
    batches: Callable[[slice], Iterable[OutputBatch]],
    fit: slice,
    choice: slice,
    saved: torch.dtype,
) -> float:
    """Changes ``attention.o_proj`` in place, to numbers that the dtype ``saved`` holds.

    ``batches(windows)`` yields what it reads and what its output lacks. The converted layer then makes up for what it
    and those below it lost, as far as a linear map can. W_o moves by argmin ||X change - E||^2 + ridge ||change||^2.
    The ridge is chosen on windows that were not fitted.

    Returns:
        The squared loss of the output on ``choice`` after it.
    """
    projection = attention.o_proj
    inputs, bias = projection.in_features, projection.bias is not None
    fitted, chosen = (normal_equations(batches(part), bias=bias) for part in (fit, choice))
    change = best_change(fitted, chosen, bias=bias)
    if change is None:
        return chosen.error
    before = _affine(projection)
    after = (before + change).to(saved)
    projection.weight.data.copy_(after[:inputs].T)
    if bias:
        projection.bias.data.copy_(after[inputs])
    return max(chosen.error_of(_affine(projection) - before), 0.0)


def _affine(projection: Any) -> Tensor:
    """Weight and bias of ``projection`` as one map [F+1,D] of features with a 1 behind them; float64."""
    weight: Tensor = projection.weight.double().T
    return weight if projection.bias is None else torch.cat([weight, projection.bias.double()[None]])

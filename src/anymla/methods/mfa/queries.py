"""Queries of all heads from few numbers: the factors S_q and Q of MFA's queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

DAMPING = 1e-6  # share of the identity in the moments: directions that calibration never saw keep an order


def low_rank_queries(
    query: Tensor, projection: Any, rank: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of all heads' queries: S_q [Cq,D], its bias [Cq], and Q [H C,Cq], the best of rank ``rank``.

    ``query`` [H C,H d] reads what ``projection``, a Linear with a bias, makes of x. ``gram`` [D+1,D+1]: moments of x
    with a 1 after it, under which the error is least; None: the identity. Exact from rank min(D + 1, H d) on.
    """
    weight = projection.weight
    bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias
    whole = query @ torch.cat([weight, bias[:, None]], dim=1)  # [H C,D+1]
    root = _root(whole.shape[1], whole, gram)
    left, values, right = torch.linalg.svd(whole @ root, full_matrices=False)
    kept = min(rank, len(values))
    down = torch.linalg.solve(root.T, right[:kept].T).T * values[:kept, None].sqrt()
    down, up = pad(down, (0, 0, 0, rank - kept)), pad(left[:, :kept] * values[:kept].sqrt(), (0, rank - kept))
    return down[:, :-1], down[:, -1], up


def _root(size: int, like: Tensor, gram: Tensor | None) -> Tensor:
    """A square root of the moments [D+1,D+1]."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    if gram is None:
        return identity
    damped = gram + DAMPING * gram.diagonal().mean() * identity
    root: Tensor = torch.linalg.cholesky(damped)
    return root

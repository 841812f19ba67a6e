"""Some tokens as they are, for what is no function of moments.

Shapes: H query heads, G key/value heads, d head_dim, T tokens, P rope pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_WINDOWS, SAMPLE_QUERIES = 4, 128  # of the first batch: what Sample holds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Queries and keys of a few tokens, before rope, for methods that look at single scores.

    query [S,H,R,d]: R evenly spaced tokens of S windows; key [S,G,T,d]; turn [R,T,P]: e^{i Delta theta_f} of every pair
    of tokens; allowed [R,T]: whether the first may look at the second.
    """

    query: Tensor
    key: Tensor
    turn: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, turn: Tensor, mask: Tensor) -> Sample:
        """Takes it from a batch: query [B,H,T,d], key [B,G,T,d], turn [T,P] of unit length, additive mask."""
        windows, length = min(SAMPLE_WINDOWS, len(query)), query.shape[2]
        rows = torch.arange(0, length, max(1, windows * length // SAMPLE_QUERIES), device=query.device)
        allowed = mask[0, 0].expand(length, length)[rows] > torch.finfo(mask.dtype).min / 2
        relative = turn[rows, None] * turn.conj()
        return cls(query=query[:windows, :, rows], key=key[:windows], turn=relative, allowed=allowed)

"""A coded cache whose queries see the last tokens exactly: an error of a near token costs most.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

Shapes: B batch, T new tokens, S cached tokens, E latest tokens, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .absorbed import additive_mask
from .block_maps import grouped
from .coded_attention import CodedAttention
from .heads import attention_weights
from .placed_tokens import Run
from .rows_attention import Rows

BLOCK = 128  # queries at a time: bounds memory to their scores


class CodedWindowAttention(CodedAttention):
    """Attention over a cache of codes, and of the last tokens' coefficients as they were before coding."""

    def attend_few(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """One token at a time, for each has a window of its own; returns [B,T,H,d]."""
        new, outputs = query.shape[2], []
        mask = self.shown(mask, new, rows.keys.shape[1], query.device)
        for token in range(new):
            own = slice(token, token + 1)
            seen = None if mask is None else mask[..., own, :]
            outputs.append(self.attend_in_chunks(query[:, :, own], self._of_token(rows, token, new), seen))
        return torch.cat(outputs, dim=1)

    def _of_token(self, rows: Rows, token: int, new: int) -> Rows:
        """What one of ``new`` tokens sees, with the exact coefficients of its window in place."""
        if rows.latest is None:
            raise ValueError("a cache without the latest tokens has no exact window")
        last = rows.latest[0].shape[1] - new + token  # its own place among the latest
        inside = slice(max(0, last - self.coded.exact_window + 1), last + 1)
        keys, values = (states[:, inside] for states in rows.latest)
        column = rows.start + token
        latest = Run(keys, values, column + 1 - keys.shape[1])
        return rows._replace(places=(*rows.places, latest), start=column)

    def attend_all(
        self,
        query: Tensor,
        coded: tuple[Tensor, Tensor],
        latest: tuple[Tensor, Tensor],
        start: int,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Some queries at a time: their scores with the last tokens are exact ones, and so are those tokens' values.

        Raises:
            NotImplementedError: a mask of a kind that says nothing of single tokens.
        """
        new, causal = query.shape[2], mask is None and self.is_causal
        mask = self.shown(mask, new, coded[0].shape[1], query.device)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise NotImplementedError("a model with an exact window runs with attn_implementation sdpa or eager only")
        first = start + new - latest[0].shape[1]  # column of the first of the latest
        _, exact_key, exact_value = self.rebuilt(query, latest, start, first)
        query, key, value = self.rebuilt(query, coded, start)
        query = query * self.scaling
        lost = exact_value - value[:, :, first : start + new]
        outputs = []
        for begin in range(0, new, BLOCK):
            rows = slice(begin, min(begin + BLOCK, new))
            stop = start + rows.stop if causal else key.shape[2]  # no query sees what comes later
            near = slice(max(first, start + begin - self.coded.exact_window + 1), start + rows.stop)
            held, inside = slice(near.start - first, near.stop - first), self._inside(rows, near, start, query)
            scores = grouped(query[:, :, rows], key[:, :, :stop].mT)
            exact = grouped(query[:, :, rows], exact_key[:, :, held].mT)
            scores[..., near] = exact.where(inside, scores[..., near])
            seen = None if mask is None else additive_mask(mask[..., rows, :stop], query.dtype)
            weights = attention_weights(scores, seen, self.spec.softcap, self.sinks).to(value.dtype)
            weights = dropout(weights, self.attention_dropout, self.training)
            outputs.append(
                grouped(weights, value[:, :, :stop]) + grouped(weights[..., near] * inside, lost[:, :, held])
            )
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    def _inside(self, rows: slice, near: slice, start: int, like: Tensor) -> Tensor:
        """Which of the columns ``near`` lie in the window of which of the new tokens ``rows``: [t,e]."""
        tokens = torch.arange(start + rows.start, start + rows.stop, device=like.device)
        distance = tokens[:, None] - torch.arange(near.start, near.stop, device=like.device)
        return (distance >= 0) & (distance < self.coded.exact_window)

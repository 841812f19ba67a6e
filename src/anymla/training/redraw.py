"""Little text for many passes: the original draws some tokens of a row anew, each by what stands before it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymla.evaluation.logits import Logits


def redrawn(logits: Logits, ids: Tensor, begins: Tensor, share: float, seed: int) -> Tensor:
    """``ids`` [B,T] with some tokens drawn from the distributions that ``logits`` [B,T,V] give for their places.

    Of each row, a share is drawn anew that is itself drawn between 0 and ``share``. A row's own tokens and ``seed`` say
    which, and so neither other rows nor a stopped run change it. ``begins`` [B,T]: the first tokens of documents, which
    stay.
    """
    length = ids.shape[1]
    numbers = [_numbers(seed + total, length) for total in ids.sum(-1).tolist()]
    limits, chances, places = (torch.stack(each).to(ids.device) for each in zip(*numbers, strict=True))
    drawn = [_drawn(logits.at(part), places[:, part]) for part in logits.parts(last=length - 1)]
    chosen = (chances < share * limits) & ~begins
    chosen[:, 0] = False
    return torch.cat([ids[:, :1], *drawn], dim=1).where(chosen, ids)


def _numbers(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """One number [1] and two times [T] of them, between 0 and 1."""
    numbers = torch.rand(1 + 2 * length, generator=torch.Generator().manual_seed(seed))
    return numbers[:1], numbers[1 : 1 + length], numbers[1 + length :]


def _drawn(logits: Tensor, places: Tensor) -> Tensor:
    """Tokens [B,t] where the distributions of ``logits`` [B,t,V], summed up, pass ``places`` [B,t]."""
    sums = logits.float().softmax(-1).cumsum(-1)
    found = torch.searchsorted(sums, (places[..., None] * sums[..., -1:]).contiguous(), right=True)
    return found[..., 0].clamp(max=logits.shape[-1] - 1)

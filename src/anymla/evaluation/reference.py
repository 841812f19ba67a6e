"""What an original says to a text, kept, so that any number of models are held to it.

Shapes: N windows, B of them at once, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.account import Account
from anymla.evaluation.likelihood import untracked
from anymla.evaluation.logits import Logits, logits_of_pass
from anymla.evaluation.scores import Scores, ScoreSums

if TYPE_CHECKING:
    from anymla.evaluation.likelihood import Track


@dataclass(frozen=True)
class Reference:
    """Windows of text [B,T] and the original's logits there, which are made when they are asked for."""

    original: Any
    windows: tuple[Tensor, ...]
    logits: tuple[Logits, ...]

    @classmethod
    @torch.no_grad()
    def of(
        cls, original: Any, windows: Tensor, *, batch: int = 1, track: Track = untracked, label: str = ""
    ) -> Reference:
        """Runs ``original`` over ``windows`` [N,T], ``batch`` at once; what is kept are its last hidden states."""
        batches = windows.to(original.device).split(batch)
        logits = (logits_of_pass(original, {"input_ids": ids}) for ids in track(batches, label))
        return cls(original, batches, tuple(logits))

    @property
    def read(self) -> Tensor:
        """All windows [N,T]."""
        return torch.cat(self.windows)

    @torch.no_grad()
    def scores(self, model: Any, cache: Account, *, track: Track = untracked, label: str = "") -> Scores:
        """Scores of ``model`` against the original, which may be the same; ``cache``: as :func:`measure` gives it."""
        sums, pairs = ScoreSums(), list(zip(self.windows, self.logits, strict=True))
        for ids, reference in track(pairs, label):
            same = model is self.original
            sums.add(reference if same else logits_of_pass(model, {"input_ids": ids}), ids, reference)
        return sums.scores(cache)

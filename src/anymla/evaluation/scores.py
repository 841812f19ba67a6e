"""Quality and cache of a model: perplexity, KL to the original, same top token, and bytes read from the live cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anymla.account import Account, measure
from anymla.distributed import all_sum
from anymla.errors import CheckpointError
from anymla.evaluation.logits import Logits, logits_of_pass

LARGEST_LOSS = 700.0  # nats; keeps the perplexity a finite number


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a model on a text; ``kl`` (nats per token) and ``top1_agreement`` are None without an original.

    ``cache_bytes_per_token``: of a token that every layer holds; one with a sliding window holds its last ones only.
    ``cache_window_bytes``: what the last tokens, kept exactly, take once beside the bytes of every token.
    ``kl_error``: the standard error of ``kl`` over the windows of text; None without an original, or of one window.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    cache_bytes_per_token: int
    cache_numbers_per_token_per_layer: float
    tokens: int
    cache_window_bytes: int = 0
    kl_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores under their stable JSON names."""
        return asdict(self)


class ScoreSums:
    """Running sums over batches of windows, on the device of the logits: they are read once, at the end."""

    def __init__(self) -> None:
        self.tokens = self.scored = self.windows = 0
        self.loss: Any = 0.0
        self.kl: Any = 0.0
        self.squared_kl: Any = 0.0  # of each window's mean
        self.agreed: Any = 0.0
        self.original_loss: Any = 0.0
        self.compared = False

    def add(self, logits: Logits, ids: Tensor, reference: Logits | None) -> None:
        """Adds windows ``ids`` [B,T] with ``logits`` [B,T,V] and those of the original."""
        self.tokens += ids.numel()
        self.scored += ids[:, 1:].numel()
        self.windows += len(ids)
        self.compared = self.compared or reference is not None
        kl = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for part in logits.parts(last=ids.shape[1] - 1):
            log_p = _log_softmax(logits.at(part))
            following = ids[:, part.start + 1 : part.stop + 1, None]
            self.loss -= log_p.gather(-1, following).sum(dtype=torch.float64)
            if reference is not None:
                log_q = log_p if reference is logits else _log_softmax(reference.at(part).to(log_p.dtype))
                kl += (log_q.exp() * (log_q - log_p)).sum(-1).sum(-1, dtype=torch.float64)
                self.original_loss -= log_q.gather(-1, following).sum(dtype=torch.float64)
                self.agreed += (log_q.argmax(-1) == log_p.argmax(-1)).sum(dtype=torch.float64)
        self.kl += kl.sum()
        self.squared_kl += (kl / (ids.shape[1] - 1)).square().sum()

    def over_all_processes(self, device: str) -> ScoreSums:
        """These sums and those of all other processes, which are then the same everywhere."""
        names = ("tokens", "scored", "windows", "loss", "kl", "squared_kl", "agreed", "original_loss", "compared")
        sums = all_sum(torch.tensor([float(getattr(self, name)) for name in names], dtype=torch.float64, device=device))
        self.tokens, self.scored, self.windows = map(int, sums[:3])
        self.loss, self.kl, self.squared_kl, self.agreed, self.original_loss = sums[3:8].tolist()
        self.compared = bool(sums[8])
        return self

    def quality(self) -> tuple[float, float | None]:
        """Perplexity, and KL in nats per token where there was something to compare to.

        Raises:
            CheckpointError: a logit was NaN.
        """
        loss, kl = float(self.loss), float(self.kl)
        if math.isnan(loss + kl):
            raise CheckpointError("the model gives NaN on this text: its dtype may overflow, give --dtype float32")
        return _perplexity(loss / self.scored), max(0.0, kl / self.scored) if self.compared else None

    def scores(self, cache: Account) -> Scores:
        """The means, with the cache's size.

        Raises:
            CheckpointError: a logit was NaN.
        """
        perplexity, kl = self.quality()
        return Scores(
            perplexity=perplexity,
            kl=kl,
            top1_agreement=float(self.agreed) / self.scored if self.compared else None,
            cache_bytes_per_token=cache.cache_bytes_per_token,
            cache_numbers_per_token_per_layer=cache.numbers_per_layer,
            tokens=self.tokens,
            cache_window_bytes=cache.cache_bytes_once,
            kl_error=self._kl_error(),
        )

    def _kl_error(self) -> float | None:
        if not self.compared or self.windows < 2:
            return None
        variance = float(self.squared_kl) / self.windows - (float(self.kl) / self.scored) ** 2
        return math.sqrt(max(0.0, variance) / (self.windows - 1))

    def original_scores(self, cache: Account) -> Scores:
        """Returns those of the original, from the same logits; ``cache`` is its own."""
        same = replace(self.scores(cache), kl=0.0, top1_agreement=1.0, kl_error=0.0)
        return replace(same, perplexity=_perplexity(float(self.original_loss) / self.scored))


def _perplexity(loss: float) -> float:
    """Of a mean loss in nats per token."""
    return math.exp(min(loss, LARGEST_LOSS))


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or finer."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def score_model(model: Any, windows: Iterable[Tensor], original: Any = None) -> Scores:
    """Scores ``model`` on ``windows`` of tokens, [T] each, against ``original`` where given."""
    return _score_sums(model, windows, original).scores(measure(model))


def score_both(model: Any, windows: Iterable[Tensor], original: Any = None) -> tuple[Scores, Scores | None]:
    """Scores of ``model`` as :func:`score_model` gives them, and those of ``original`` where given."""
    sums = _score_sums(model, windows, original)
    theirs = None if original is None else sums.original_scores(measure(original))
    return sums.scores(measure(model)), theirs


@torch.no_grad()
def _score_sums(model: Any, windows: Iterable[Tensor], original: Any) -> ScoreSums:
    sums = ScoreSums()
    for window in windows:
        ids = window[None].to(model.device)
        logits = logits_of_pass(model, {"input_ids": ids})
        reference = logits if original is model else None
        if original is not None and original is not model:
            reference = logits_of_pass(original, {"input_ids": ids})
        sums.add(logits, ids, reference)
    return sums

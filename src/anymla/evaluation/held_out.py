"""What a conversion changed, on the calibration windows that it did not look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from anymla.account import Account
from anymla.evaluation.logits import Logits
from anymla.evaluation.scores import Scores, ScoreSums
from anymla.io.streamed import StreamedModel
from anymla.io.telling import tell
from anymla.model_run.stream import decoder_layers, logits_of


def held_out_scores(
    source: StreamedModel,
    windows: Tensor,
    original: Iterable[Tensor],
    converted: Iterable[Tensor],
    *,
    caches: tuple[Account, Account],
    tuples: bool,
) -> tuple[Scores, Scores]:
    """Scores of the original and of the converted model on the held-out windows of all processes.

    Args:
        source: the original, whose last norm and head make the logits.
        windows: this process's windows [N,T].
        original: the original's final hidden states [1,T,D] of each, in order.
        converted: those of the converted model.
        caches: of each model, as measured.
        tuples: whether layers of this family return tuples.
    """
    tell("scoring")
    before, after = ScoreSums(), ScoreSums()
    with source.on_demand(decoder_layers(source.model)):
        for window, true, hidden in zip(windows, original, converted, strict=True):
            ids, reference = window[None].to(source.device), _logits(source.model, true, tuples)
            before.add(reference, ids, reference)
            after.add(_logits(source.model, hidden, tuples), ids, reference)
    first, second = (sums.over_all_processes(source.device) for sums in (before, after))
    return first.scores(caches[0]), second.scores(caches[1])


def kl_of_streams(
    source: StreamedModel, windows: Tensor, original: Iterable[Tensor], changed: Iterable[Tensor], *, tuples: bool
) -> float:
    """KL in nats per token of final hidden states [1,T,D] to the original's, over the windows of all processes."""
    sums = ScoreSums()
    with source.on_demand(decoder_layers(source.model)):
        for window, true, hidden in zip(windows, original, changed, strict=True):
            reference = _logits(source.model, true, tuples)
            sums.add(_logits(source.model, hidden, tuples), window[None].to(source.device), reference)
    return sums.over_all_processes(source.device).quality()[1] or 0.0


def _logits(model: Any, hidden: Tensor, tuples: bool) -> Logits:
    """Those of final hidden states [B,T,D], through the model's own norm and head."""
    shape = (*hidden.shape[:2], model.config.get_text_config().vocab_size)
    return Logits(hidden, lambda states, part: logits_of(model, states[:, part], tuples=tuples), shape)

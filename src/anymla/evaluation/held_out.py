"""What a conversion changed, on the calibration windows that it did not look at."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anymla.account import Account
from anymla.evaluation.logits import Logits
from anymla.evaluation.scores import Scores, ScoreSums
from anymla.io.streamed import StreamedModel
from anymla.model_run.stream import decoder_layers, logits_of
from anymla.sweep.sequence import Converted


def held_out_scores(streamed: StreamedModel, converted: Converted, *, tuples: bool) -> tuple[Scores, Scores]:
    """Scores of the original and of the converted model on the held-out windows of all processes.

    ``tuples``: whether layers of this family return tuples.
    """
    before, after = ScoreSums(), ScoreSums()
    with streamed.on_demand(decoder_layers(streamed.model)):
        pairs = zip(
            converted.streams.original.split(1, converted.held_out),
            converted.streams.converted.split(1, converted.held_out),
            strict=True,
        )
        for (original, hidden), window in zip(pairs, converted.windows[converted.held_out], strict=True):
            ids, reference = window[None].to(streamed.device), _logits(streamed.model, original, tuples)
            before.add(reference, ids, reference)
            after.add(_logits(streamed.model, hidden, tuples), ids, reference)
    cache_before = Account(layers=tuple(record.before for record in converted.records if record.before is not None))
    cache_after = Account(layers=tuple(record.after for record in converted.records if record.after is not None))
    device = streamed.device
    return before.over_all_processes(device).scores(cache_before), after.over_all_processes(device).scores(cache_after)


def _logits(model: Any, hidden: Tensor, tuples: bool) -> Logits:
    """Those of final hidden states [B,T,D], through the model's own norm and head."""
    shape = (*hidden.shape[:2], model.config.get_text_config().vocab_size)
    return Logits(lambda part: logits_of(model, hidden[:, part], tuples=tuples), shape)

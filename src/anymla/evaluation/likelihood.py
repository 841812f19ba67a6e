"""How likely a model finds given tokens: what BLiMP, LAMBADA and the probe are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.errors import CheckpointError, TextError
from anymla.evaluation.logits import logits_of_pass
from anymla.evaluation.measures import Measure

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # (steps, what they do): the steps, while a bar may show them


def untracked(steps: Sequence[Any], text: str) -> Iterable[Any]:
    """A :data:`Track` that shows nothing."""
    return steps


@dataclass(frozen=True)
class Query:
    """The tokens ``ids[start:]``, given those before; where ``among`` is given, it is all that can come."""

    ids: Sequence[int]
    start: int
    among: Sequence[int] | None = None

    def within(self, context: int | None) -> Query:
        """The query without what lies further back than ``context`` tokens."""
        cut = 0 if context is None else max(0, len(self.ids) - context)
        return self if cut == 0 else Query(self.ids[cut:], max(1, self.start - cut), self.among)


@dataclass(frozen=True)
class Answer:
    """For each token asked for: its log-probability in nats [n], and whether it was the most likely [n]."""

    log_probs: Tensor
    likeliest: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Answer]) -> Answer:
        """The answer whose tokens were asked for in parts."""
        return cls(torch.cat([part.log_probs for part in parts]), torch.cat([part.likeliest for part in parts]))


@dataclass(frozen=True)
class Questions:
    """Queries to a model, and the measures of its answers, which come in the same order."""

    queries: Sequence[Query]
    measures: Callable[[list[Answer]], list[Measure]]


@torch.no_grad()
def answers(
    model: Any, queries: Sequence[Query], *, context: int | None, batch_size: int, track: Track, label: str
) -> list[Answer]:
    """The model's answer to each query, the longest first, in batches padded on the right, where no token looks.

    Raises:
        CheckpointError: a logit was NaN.
        TextError: the tokenizer gave an id that the model does not have.
    """
    fitted = [query.within(context) for query in queries]
    largest, size = max(max(query.ids) for query in fitted), int(model.config.get_text_config().vocab_size)
    if largest >= size:
        raise TextError(f"{label}: the tokenizer gives id {largest} but the model has {size} tokens")
    order = sorted(range(len(fitted)), key=lambda index: -len(fitted[index].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[int, Answer] = {}
    for batch in track(batches, label):
        found |= zip(batch, _answer(model, [fitted[index] for index in batch]), strict=True)
    return [found[index] for index in range(len(fitted))]


def _answer(model: Any, batch: Sequence[Query]) -> list[Answer]:
    longest = len(batch[0].ids)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, query in enumerate(batch):
        ids[row, : len(query.ids)] = torch.tensor(query.ids)
    whole = logits_of_pass(model, {"input_ids": ids.to(model.device)})
    found: list[list[Answer]] = [[] for _ in batch]
    for part in whole.parts(min(query.start for query in batch) - 1, longest - 1):
        logits = whole.at(part)
        for row, query in enumerate(batch):
            first, last = max(part.start, query.start - 1), min(part.stop, len(query.ids) - 1)
            if first < last:
                asked = Query(query.ids[: last + 1], first + 1, query.among)
                found[row].append(_of_row(logits[row, first - part.start : last - part.start], asked))
    answers = Answer.joined([part for parts in found for part in parts])
    if answers.log_probs.isnan().any():  # as all of a token's are if one is
        raise CheckpointError("the model gives NaN on this text: its dtype may overflow, give --dtype float32")
    sizes = [sum(len(part.log_probs) for part in parts) for parts in found]
    rows = zip(answers.log_probs.cpu().split(sizes), answers.likeliest.cpu().split(sizes), strict=True)
    return [Answer(*row) for row in rows]


def _of_row(logits: Tensor, query: Query) -> Answer:
    """The answer from the logits [n,V] of the tokens before those asked for."""
    targets = torch.tensor(query.ids[query.start :], device=logits.device)
    if query.among is not None:
        among = torch.tensor(query.among, device=logits.device)
        logits, targets = logits[:, among], (targets[:, None] == among).long().argmax(-1)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return Answer(log_probs.gather(-1, targets[:, None])[:, 0], log_probs.argmax(-1) == targets)

"""LAMBADA from a local file: does a model find the last word of a passage, given the rest?

Paperno et al. 2016, arXiv 1606.06031. A .jsonl file with the whole passage in the field ``text``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from anymla.data.text import first_tokens, read_documents
from anymla.errors import TextError
from anymla.evaluation.likelihood import Answer, Query, Questions
from anymla.evaluation.measures import Measure, mean_error
from anymla.evaluation.scores import LARGEST_LOSS


def lambada_questions(source: Path, tokenizer: Any, limit: int | None) -> Questions:
    """The last word of each of the first ``limit`` passages; it begins after the last white space.

    Raises:
        TextError: not a readable .jsonl file, or a passage of one word only.
    """
    if source.suffix != ".jsonl" or not source.is_file():
        raise TextError(f"--lambada {source} must be a .jsonl file whose lines have a field 'text'")
    return Questions([_query(passage, source, tokenizer) for passage in read_documents(source)[:limit]], _measures)


def _query(passage: str, source: Path, tokenizer: Any) -> Query:
    """The tokens of the passage, those of its last word being asked for."""
    rest = passage.rsplit(maxsplit=1)[0]
    begin = first_tokens(tokenizer)
    whole, given = (begin + tokenizer(part, add_special_tokens=False)["input_ids"] for part in (passage, rest))
    if rest == passage or not 0 < len(given) < len(whole):
        raise TextError(f"--lambada {source}: the passage {passage!r:.80} has no last word to ask for")
    return Query(whole, len(given))


def _measures(found: list[Answer]) -> list[Measure]:
    """Accuracy (all tokens of the word are the most likely) and perplexity per word."""
    losses = [-float(answer.log_probs.sum()) for answer in found]
    perplexity = math.exp(min(sum(losses) / len(losses), LARGEST_LOSS))
    error = mean_error(losses)
    return [
        Measure.mean("lambada", "accuracy", [float(answer.likeliest.all()) for answer in found]),
        Measure(
            name="lambada",
            metric="perplexity",
            value=perplexity,
            stderr=None if error is None else perplexity * error,
            samples=len(found),
            higher_is_better=False,
        ),
    ]

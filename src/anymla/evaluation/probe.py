"""What a model finds again in its context: a probe that needs no data, for every length and depth.

Filler text with something planted at a depth, and asked for at the end:

- copy: a row of random tokens; when its first four come again, the other twelve (induction, arXiv 2209.11895).
- recall: a passage of a story, in the same way; how much likelier it is than with another passage planted there.
- needle: a magic word; how likely it is among eight words when it is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from anymla.data.text import bundled_text, first_tokens, read_documents
from anymla.errors import RecipeError, TextError
from anymla.evaluation.likelihood import Answer, Query, Questions
from anymla.evaluation.measures import Measure

SHORTEST, LENGTHS = 64, 4  # tokens; how many lengths, each half of the next
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: at the beginning; 1: right before it is asked for
TRIALS = 8
PLANTED, GIVEN = 16, 4  # tokens of a row or passage; how many of its repetition are the cue, and not asked for
WORDS = ("apple", "bread", "candle", "door", "flower", "garden", "hat", "kite")
NEEDLE, QUESTION = " The magic word is {}.", " The magic word is"


@dataclass(frozen=True)
class Trial:
    """One question: what is planted, what is asked at the end, how many of its last tokens count, and among which."""

    planted: list[int]
    asked: list[int]
    count: int
    among: Sequence[int] | None = None


def probe_lengths(length: int) -> list[int]:
    """Up to four lengths: ``length``, its half, ... and none below 64 tokens."""
    return [length >> halvings for halvings in reversed(range(LENGTHS)) if length >> halvings >= SHORTEST]


def probe_questions(tokenizer: Any, length: int) -> Questions:
    """The questions for all lengths up to ``length`` tokens; the same ones for the same tokenizer.

    Raises:
        RecipeError: ``length`` is below 64 tokens.
        TextError: the tokenizer makes too little of the bundled text, or does not tell the magic words apart.
    """
    if not (lengths := probe_lengths(length)):
        raise RecipeError(f"--probe needs windows of {SHORTEST} tokens; --length or the model's context gives {length}")
    filler = _encode(tokenizer, " ".join(read_documents(bundled_text("valid"))))
    random_tokens = _kinds_of_tokens(tokenizer, filler)
    passages = _passages(tokenizer)
    others = [Trial(passages[trial - 1].planted, own.asked, own.count) for trial, own in enumerate(passages)]
    kinds = [_rows(random_tokens), passages, others, _needles(tokenizer)]
    begin = first_tokens(tokenizer)
    queries = [
        _query(begin, filler, trials[index], length, depth, index)
        for trials, length, depth, index in product(kinds, lengths, DEPTHS, range(TRIALS))
    ]
    return Questions(queries, lambda found: _measures(lengths, 1 / len(random_tokens), found))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _query(begin: list[int], filler: list[int], trial: Trial, length: int, depth: float, index: int) -> Query:
    """``length`` tokens: filler, what is planted at ``depth`` in it, more filler, what is asked."""
    left = length - len(begin) - len(trial.planted) - len(trial.asked)
    start = index * len(filler) // TRIALS
    text = [filler[(start + place) % len(filler)] for place in range(left)]
    before = round(depth * left)
    ids = [*begin, *text[:before], *trial.planted, *text[before:], *trial.asked]
    return Query(ids, len(ids) - trial.count, trial.among)


def _kinds_of_tokens(tokenizer: Any, filler: list[int]) -> list[int]:
    """What the bundled text is made of: tokens that the model has surely seen."""
    tokens = sorted(set(filler) - set(tokenizer.all_special_ids))
    if len(tokens) < PLANTED:
        raise TextError(f"--probe: the tokenizer makes only {len(tokens)} kinds of tokens of the bundled text")
    return tokens


def _rows(tokens: list[int]) -> list[Trial]:
    """Random tokens, none twice in a row of them."""
    rows = [random.Random(trial).sample(tokens, PLANTED) for trial in range(TRIALS)]
    return [Trial(row, row, PLANTED - GIVEN) for row in rows]


def _passages(tokenizer: Any) -> list[Trial]:
    """Passages of the bundled text that is no filler."""
    ids = _encode(tokenizer, " ".join(read_documents(bundled_text("train"))[:TRIALS]))
    starts = [trial * (len(ids) - PLANTED) // TRIALS for trial in range(TRIALS)]
    passages = [ids[start : start + PLANTED] for start in starts]
    return [Trial(passage, passage, PLANTED - GIVEN) for passage in passages]


def _needles(tokenizer: Any) -> list[Trial]:
    """Each word in its turn; all are asked for up to where their tokens first differ."""
    asked = [_encode(tokenizer, f"{QUESTION} {word}") for word in WORDS]
    same = next((place for place, ids in enumerate(zip(*asked, strict=False)) if len(set(ids)) > 1), 0)
    among = [ids[same] for ids in asked if len(ids) > same]
    if len(set(among)) < len(WORDS):
        raise TextError("--probe: the tokenizer does not tell its words apart by their first tokens")
    return [
        Trial(_encode(tokenizer, NEEDLE.format(word)), ids[: same + 1], 1, among)
        for word, ids in zip(WORDS, asked, strict=True)
    ]


def _accuracy(answer: Answer) -> float:
    return float(answer.likeliest.float().mean())


def _probability(answer: Answer) -> float:
    return float(answer.log_probs.exp().mean())


def _log_prob(answer: Answer) -> float:
    return float(answer.log_probs.mean())


def _measures(lengths: list[int], random_chance: float, found: list[Answer]) -> list[Measure]:
    """Of each kind and metric the mean of all trials, then that of each length and depth."""
    size = len(lengths) * len(DEPTHS) * TRIALS
    copy, recall, others, needle = (found[start : start + size] for start in range(0, 4 * size, size))
    gains = [_log_prob(own) - _log_prob(other) for own, other in zip(recall, others, strict=True)]
    word_chance = 1 / len(WORDS)
    return [
        *_grid("copy", "probability", [_probability(answer) for answer in copy], lengths, random_chance),
        *_grid("copy", "accuracy", [_accuracy(answer) for answer in copy], lengths, random_chance),
        *_grid("recall", "gain (nats per token)", gains, lengths, 0),
        *_grid("needle", "probability", [_probability(answer) for answer in needle], lengths, word_chance),
        *_grid("needle", "accuracy", [_accuracy(answer) for answer in needle], lengths, word_chance),
    ]


def _grid(name: str, metric: str, outcomes: list[float], lengths: list[int], chance: float) -> list[Measure]:
    cells = [{"length": length, "depth": depth} for length, depth in product(lengths, DEPTHS)]
    parts = [outcomes[index * TRIALS : (index + 1) * TRIALS] for index in range(len(cells))]
    by_trial = [fmean(outcomes[trial::TRIALS]) for trial in range(TRIALS)]  # its cells are not independent
    return [
        Measure.mean(name, metric, by_trial, facts={"chance": chance}),
        *(
            Measure.mean(name, metric, part, part_of=name, facts={**cell, "chance": chance})
            for part, cell in zip(parts, cells, strict=True)
        ),
    ]

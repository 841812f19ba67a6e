"""Whether an export is the converted model: logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from anymla.errors import ParityError
from anymla.exports.cache_loss import CacheLoss
from anymla.io.checkpoint import load_model, load_tokenizer
from anymla.io.config import read_object
from anymla.modeling.arguments import cache_argument, cache_of

PROMPTS = (
    "Once upon a time, there was a little girl who",
    "The capital of France is Paris, and the river that runs through it is",
    "def add(a, b):\n    # the sum of two numbers\n    return",
)
NEW_TOKENS = 32
# Largest difference of two logits (or log probabilities), over the logits' standard deviation. Both models run in
# float32; the export's weights, as they are multiplied by factors, are rounded to their dtype once more.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
LOGITS, LOG_PROBABILITIES = "logits", "log probabilities of given tokens"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """An export beside the converted model.

    ``compared``: logits, or log probabilities of given tokens where an engine has no more. ``difference``: the largest
    of these on prompts and continuations, over the logits' standard deviation. ``tokens``: of ``of`` greedy ones, those
    equal until sequences part; they may part only between logits nearer than twice the tolerance. ``cached_numbers``:
    per token and layer, measured in the export's live cache. ``engine_failed``: how an engine that is installed failed,
    so that another one did the check. ``not_run``: why the engine that this is for was not asked.
    ``cache_loss``: what the cache that was asked for loses, where it was measured.
    """

    engine: str
    compared: str
    difference: float
    tolerance: float
    tokens: int
    of: int
    cached_numbers: float
    engine_version: str
    engine_failed: str | None = None
    not_run: str | None = None
    cache_loss: CacheLoss | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts under their stable JSON names."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """The figures in words."""
        lost = "" if self.cache_loss is None else f"; {self.cache_loss.summary}"
        return (
            f"{self.compared} within {self.difference:.2g} of the logits' standard deviation ({self.tolerance:g} "
            f"allowed), {self.tokens} of {self.of} greedy tokens equal; {self.cached_numbers:g} numbers per token and "
            f"layer in the cache{lost}"
        )


@dataclass(frozen=True)
class Answers:
    """What an export gave: ``scores`` of the converted model's sequences, its own ``sequences`` [1,T].

    Scores are logits [T,V] or, with ``compared`` LOG_PROBABILITIES, those of each sequence's tokens from its second on
    [T-1].
    """

    scores: list[Tensor]
    sequences: list[Tensor]
    cached_numbers: float
    version: str  # of the engine
    compared: str = LOGITS


def load_stock(folder: Path) -> Any:
    """The model of ``folder`` in float32, by transformers' own classes."""
    return load_model(folder, dtype="float32")


def check_parity(
    converted: Path,
    folder: Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    load: Callable[[Path], Any] = load_stock,
    tolerance: float | None = None,
) -> Parity:
    """Compares the checkpoint in ``folder``, loaded in float32 by ``load`` (stock classes), with the converted model.

    ``tolerance``: by default that of the checkpoint's dtype.

    Raises:
        ParityError: logits or tokens differ by more than the tolerance, or the cache by anything; says by how much.
    """

    def answers(ids: list[Tensor], expected: list[Tensor]) -> Answers:
        export = load(folder)
        return Answers(
            [_logits(export, tokens) for tokens in expected],
            [_continued(export, each, new_tokens(ids, expected)) for each in ids],
            _cached_numbers(export, ids[0]),
            transformers.__version__,
        )

    if tolerance is None:
        tolerance = TOLERANCE[read_object(folder / "config.json")["dtype"]]
    return compare(converted, "transformers", tolerance, answers, prompts, cached=planned_numbers(folder))


def planned_numbers(folder: Path) -> int:
    """Returns what the export in ``folder`` is to cache per token and layer: its rank and rope, as padded."""
    config = read_object(folder / "config.json")
    return int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])


def new_tokens(prompts: Sequence[Tensor], sequences: Sequence[Tensor]) -> int:
    """Returns how many tokens after the prompts are compared."""
    return sequences[0].shape[1] - prompts[0].shape[1]


def compare(
    converted: Path,
    engine: str,
    tolerance: float,
    answers: Callable[[list[Tensor], list[Tensor]], Answers],
    prompts: Sequence[str] = PROMPTS,
    *,
    cached: int,
) -> Parity:
    """Holds what an engine answers to the converted model in transformers.

    Args:
        converted: what ``anymla convert`` wrote.
        engine: its name.
        tolerance: on logits or log probabilities, over the logits' standard deviation.
        answers: asks the engine, given the prompts [1,T] and the sequences that the converted model makes of them.
        prompts: texts to begin with, cut to a short context.
        cached: the numbers that a layer is to cache per token.

    Raises:
        ParityError: scores or tokens differ by more than the tolerance, or the cache by anything; says by how much.
    """
    tokenizer = load_tokenizer(converted)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    original = load_stock(converted)
    new, ids = _within(getattr(original.config.get_text_config(), "max_position_embeddings", None), ids)
    expected = [_continued(original, each, new) for each in ids]
    scores = [_logits(original, tokens) for tokens in expected]
    del original
    given = answers(ids, expected)
    differences, equal = [], 0
    answered = zip(given.scores, given.sequences, strict=True)
    for prompt, tokens, score, (theirs, found) in zip(ids, expected, scores, answered, strict=True):
        spread = score.std()
        own = score if given.compared == LOGITS else _log_probabilities(score, tokens)
        differences.append((theirs - own).abs().max() / spread)
        same = int((tokens == found).long().cumprod(1).sum()) - prompt.shape[1]
        equal += same
        if same < new:
            place = prompt.shape[1] + same
            margin = score[place - 1].max() - score[place - 1, found[0, place]]
            differences.append(margin / spread / 2)
    parity = Parity(
        engine=engine,
        compared=given.compared,
        difference=torch.stack(differences).max().item(),  # NaN where one is
        tolerance=tolerance,
        tokens=equal,
        of=new * len(ids),
        cached_numbers=given.cached_numbers,
        engine_version=given.version,
    )
    _judge(parity, cached)
    return parity


def _judge(found: Parity, cached: int) -> None:
    """Refuses what is not the converted model, or does not cache ``cached`` numbers."""
    if not found.difference <= found.tolerance:
        raise ParityError(
            f"the export in {found.engine} is not the converted model: {found.compared} differ by "
            f"{found.difference:.2g} of the logits' standard deviation, where {found.tolerance:g} is allowed, and "
            f"{found.tokens} of {found.of} greedy tokens are the same; nothing was written"
        )
    if found.cached_numbers != cached:
        raise ParityError(
            f"the export in {found.engine} caches {found.cached_numbers:g} numbers per token and layer, where {cached} "
            "were planned; nothing was written"
        )


def _within(context: int | None, ids: list[Tensor]) -> tuple[int, list[Tensor]]:
    """New tokens and prompts, cut so that both, and one more token, fit into ``context``."""
    if context is None:
        return NEW_TOKENS, ids
    new = max(1, min(NEW_TOKENS, context // 2))
    return new, [each[:, : max(1, context - new - 1)] for each in ids]


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.double()


def _log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the tokens of ``ids`` [1,T] from the second on, [T-1]."""
    return logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@torch.no_grad()
def _continued(model: Any, ids: Tensor, count: int) -> Tensor:
    """``ids`` [1,T] and the ``count`` most likely tokens after it, decoded one by one with a cache."""
    new, cache = ids, None
    for _ in range(count):
        output = model(input_ids=new, use_cache=True, **{cache_argument(model): cache})
        cache, new = cache_of(output), output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


@torch.no_grad()
def _cached_numbers(model: Any, ids: Tensor) -> float:
    layers = cache_of(model(input_ids=ids, use_cache=True)).layers
    held: int = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))
    return held / ids.shape[1] / len(layers)

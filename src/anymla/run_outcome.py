"""What `anymla run` returns: what the model costs and how good it is, at first and after every step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anymla import __version__
from anymla.account import account
from anymla.architectures.model_spec import read_config, source_config, spec_of
from anymla.architectures.packed import packing_in, packing_of, with_packing
from anymla.io.checkpoint import ACCOUNT, check_weights
from anymla.io.sources.locate import Located
from anymla.io.sources.plain import notes_of
from anymla.modeling.spec import DTYPE_BYTES, ModelSpec, layers_of
from anymla.recipe import Recipe
from anymla.stored_bytes import packed_bytes, sized, stored_bytes


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of a model; ``weight_bytes`` is None where they are not known without making its files plain.

    ``cache_bytes_per_token``, ``cache_bytes_once``: see :class:`anymla.account.LayerAccount`.
    ``cache_bytes_at_context``: of the whole cache, once it holds ``context`` tokens. ``bits_per_weight``: of the packed
    weights, with everything that they need counted; None if there are none.
    """

    weight_bytes: int | None
    cache_bytes_per_token: int
    cache_bytes_once: int
    context: int
    cache_bytes_at_context: int
    bits_per_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores on the evaluation text; KL (nats per token) and same top token are to the original, None for itself.

    ``kl_error``: the standard error of ``kl`` over the windows of text; None where it was not measured.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    kl_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """Bytes and quality of the model after a step, or before the first one.

    ``settings``: of the step. ``seconds``: that the step took, the last call alone where it was stopped between.
    ``quality``: None without an evaluation text.
    """

    name: str
    settings: Mapping[str, Any]
    account: Cost
    quality: Quality | None
    seconds: float

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> StepOutcome:
        """The outcome that ``asdict`` described."""
        quality = described["quality"]
        made = {"account": Cost(**described["account"]), "quality": None if quality is None else Quality(**quality)}
        return cls(**{**described, **made})


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The report of a run: the place of the model, the recipe, the original, and the outcome of every step."""

    output: Path
    recipe: Recipe
    original: StepOutcome
    steps: tuple[StepOutcome, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return {
            "output": str(self.output),
            "model": self.recipe.model,
            "recipe": self.recipe.to_dict(),
            "original": asdict(self.original),
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.seconds,
            "anymla_version": __version__,
        }


def source_spec(source: Located) -> ModelSpec:
    """Returns what a model is, from its config alone; one that anymla converted may be tuned or changed further.

    Raises:
        UnsupportedModelError, CheckpointError: it is no model that anymla knows.
    """
    return with_packing(spec_of(source_config(source)), packing_in(source))


def original_cost(source: Located, context: int | None) -> Cost:
    """Returns what the original costs; its weights are counted where its folder holds them as they are."""
    spec = source_spec(source)
    if not notes_of(source):
        spec = sized(spec, stored_bytes(spec, check_weights(source.base)))
    context = context or spec.max_position_embeddings
    counted = account(spec, (context,))
    return Cost(
        weight_bytes=counted.weight_bytes,
        cache_bytes_per_token=counted.cache_bytes_per_token,
        cache_bytes_once=counted.cache_bytes_once,
        context=context,
        cache_bytes_at_context=counted.cache_bytes_at[str(context)],
    )


def step_cost(folder: Path, context: int | None) -> Cost:
    """Returns what a step's checkpoint costs, as its account.json says."""
    told, spec = json.loads((folder / ACCOUNT).read_text(encoding="utf-8")), spec_of(read_config(folder))
    context = context or spec.max_position_embeddings
    names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once")
    at = account(spec, (context,)).cache_bytes_at[str(context)]
    sizes = {name: told[name] for name in names}
    return Cost(**sizes, context=context, cache_bytes_at_context=at, bits_per_weight=packed_bits(folder))


def packed_bits(folder: Path) -> float | None:
    """Bits per packed weight of a checkpoint, with all that they need; None where no weights are packed."""
    config = read_config(folder)
    if packing_of(config) is not None:
        size, weights = packed_bytes(check_weights(folder, floats=False))
    else:
        packed = [layer.packed for layer in layers_of(config) or () if layer.packed is not None]
        width = DTYPE_BYTES[spec_of(config).dtype] if packed else 0
        size, weights = sum(each.size(width) for each in packed), sum(each.weights for each in packed)
    return 8 * size / weights if weights else None

"""The tuning recipe: every setting of a recovery training in one frozen object, read from and written to YAML."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from anymla.errors import RecipeError, shown
from anymla.methods.mla.settings import MLA
from anymla.settings import MOST, Settings, read_yaml

Train = Literal["attention", "norms", "all", "lora"]
Decay = Literal["cosine", "linear", "1-sqrt"]
Precision = Literal["float32", "mixed", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]


class Tune(Settings):
    """Settings of one recovery training. ``data`` and ``tokens`` matter to most users; all else has its default."""

    data: list[str] | None = Field(
        None,
        min_length=1,
        description="Text to learn from, again for a mixture: text file, .jsonl (field 'text'), folder of data files "
        "or hub data set name[:config[:split]]; behind an @ its share of the tokens, as file.jsonl@0.3.",
    )
    eval_data: str | None = Field(
        None, min_length=1, description="Text to score on while tuning. Default: some documents of the data."
    )
    eval_tokens: int = Field(8192, ge=256, le=MOST, description="Tokens to score on; of --eval-data the first.")
    tokens: int = Field(200_000, ge=256, le=MOST, description="Tokens to learn from, over all stages and processes.")
    layerwise: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the tokens for the first stage: each layer learns the original's output.",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Softens both distributions in the second stage's KL.")
    top_k: int | None = Field(
        None, ge=1, le=MOST, description="KL on the original's k likeliest tokens, all others as one. Default: all."
    )
    cross_entropy: float = Field(
        0.0, ge=0, le=1, description="Weight of plain next-token loss in the second stage; KL has the rest."
    )
    train: Train = Field(
        "attention",
        description="What learns: converted attention, that and all norms, all weights, or LoRA on attention.",
    )
    lora_rank: int = Field(16, ge=1, le=MOST, description="Rank of --train lora.")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak learning rate. Default: 0.2 / hidden size.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of a stage's steps over which the learning rate rises.")
    decay: Decay = Field("cosine", description="How the learning rate falls to 0 at a stage's end.")
    decay_share: float = Field(
        1.0, ge=0, le=1, description="Share of a stage's steps over which it falls; 1: all the rest."
    )
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate; the first is 0.9.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    length: int = Field(1024, ge=8, le=MOST, description="Tokens per row (at most the model's context).")
    batch: int | None = Field(
        None, ge=1, le=MOST, description="Rows per step, over all processes. Default: what makes about 400 steps."
    )
    micro_batch: int = Field(8, ge=1, le=MOST, description="Rows at once on one device, at most.")
    packing: bool = Field(True, description="Fill rows with several documents, none of which sees another.")
    precision: Precision | None = Field(
        None,
        description="float32; mixed: weights in float32, sums in bfloat16; bfloat16: weights too. "
        "Default: mixed on a GPU, else float32.",
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of holding them.")
    parallel: Parallel = Field("ddp", description="Several processes: each holds all weights, or its part of them.")
    eval_every: int | None = Field(None, ge=1, le=MOST, description="Steps between scores. Default: a stage / 10.")
    save_every: int | None = Field(
        None, ge=1, le=MOST, description="Steps between checkpoints to go on from. Default: a tenth of a stage."
    )
    early_stop: int | None = Field(
        None, ge=1, le=MOST, description="End a stage after so many scores without a better one, and take the best."
    )
    device: str = Field("auto", max_length=60, description="cpu, cuda, ...; auto takes a GPU where there is one.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of the order of documents, of LoRA's start and of dropout.")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [os.fspath(value)] if isinstance(value, str | os.PathLike) else value

    @field_validator("eval_data", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Tune:
        if self.warmup + self.decay_share > 1 and self.decay_share < 1:
            raise ValueError("warmup and decay_share are shares of the same steps: together at most 1")
        if self.early_stop is not None and self.save_every != self.eval_every:
            raise ValueError("early_stop takes the best checkpoint that was scored: save_every must be eval_every")
        return self


class ShippedRecipe(Settings):
    """A recipe for one model: how to convert it, to which shares of its cache, and how to tune what comes out."""

    model: str | None = None
    kv_cache: list[float] = Field(default_factory=list)
    convert: MLA = Field(default_factory=lambda: MLA.of({}))
    tune: Tune


def shipped_names() -> list[str]:
    """The recipes that come with anymla, by the name that ``--recipe`` takes."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped_folder().iterdir() if path.suffix == ".yaml")


def shipped_recipe(name: str) -> ShippedRecipe:
    """A recipe that comes with anymla."""
    return ShippedRecipe.model_validate(read_yaml(_shipped_folder() / f"{name}.yaml"))


def read_tuning(recipe: str | Path) -> Tune:
    """The tuning settings of a YAML file, or of a recipe that comes with anymla; only those it names are set.

    A file holds them at its top, or under ``tune`` beside ``model``, ``kv_cache`` and ``convert``.

    Raises:
        RecipeError: no such file or name, or a setting that is none.
    """
    path = Path(os.path.expanduser(recipe))
    if not os.path.exists(path):
        if str(recipe) not in shipped_names():
            raise RecipeError(f"--recipe {recipe} is neither a file nor one of {', '.join(shipped_names())}")
        path = _shipped_folder() / f"{recipe}.yaml"
    content = read_yaml(path)
    if "tune" not in content:
        return Tune.of(content, str(path))
    if not isinstance(content["tune"], dict):
        raise RecipeError(f"{path}: tune must hold names and values")
    if unknown := content.keys() - ShippedRecipe.model_fields.keys():
        raise RecipeError(f"{path}: {shown(min(unknown))} is not one of {', '.join(ShippedRecipe.model_fields)}")
    return Tune.of(content["tune"], str(path))


def _shipped_folder() -> Path:
    return Path(str(resources.files("anymla") / "training" / "recipes"))

"""The step `tune`: trains a converted model until it gives what the original gave (arXiv 2502.14837, section 3.3)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from anymla.methods.base import Facts, Method, Paper, Phase, Plan
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST

Train = Literal["attention", "norms", "all", "lora", "zero_points"]
Decay = Literal["cosine", "linear", "1-sqrt"]
Precision = Literal["float32", "mixed", "bfloat16"]
STEP = "step"  # what is counted while a run lasts
Parallel = Literal["ddp", "fsdp"]


class Tune(Method):
    """Settings of one recovery training. ``data`` and ``tokens`` matter to most users. All else has a default.

    Deviations from the paper: the original is the teacher, first layer by layer and then by its logits. The paper
    trains all weights on text alone (``cross_entropy: 1``), for 0.3 to 1 % of the pre-training data.

    ``train: zero_points`` is QA-LoRA (arXiv 2309.14717, section 3.3), by the original's logits.
    """

    name: ClassVar[str] = "tune"
    paper: ClassVar[Paper] = Paper(title="MHA2MLA: data-efficient fine-tuning", arxiv="2502.14837")
    phase: ClassVar[Phase] = Phase.HEAL
    summary: ClassVar[str] = "recovery training: the original teaches the smaller model"
    saves: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[dict[str, Any]] = {"data": "text.jsonl"}

    data: list[str] | None = Field(
        None,
        min_length=1,
        description="Text to learn from; repeat it for a mixture. A text file, .jsonl (field 'text'), folder of data "
        "files or hub data set name[:config[:split]]. file.jsonl@0.3 gives it that share of the tokens.",
    )
    eval_data: str | None = Field(
        None, min_length=1, description="Text to score on while tuning. Default: some documents of the data."
    )
    eval_tokens: int = Field(8192, ge=256, le=MOST, description="Tokens to score on, from the start of --eval-data.")
    tokens: int | None = Field(
        None,
        ge=256,
        le=MOST,
        description="Tokens to learn from, over all stages and processes. Default: 30 passes over local text, at most "
        "4,000,000 tokens; the run ends earlier where three scores in a row were no better.",
    )
    layerwise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the tokens for the first stage: each layer learns the original's output. None where "
        "layers were removed, for which of the original's those that are left should learn from is not known.",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Softens both distributions in the second stage's KL.")
    top_k: int | None = Field(
        None, ge=1, le=MOST, description="KL on the original's k most likely tokens, all others as one. Default: all."
    )
    cross_entropy: float = Field(
        0.0, ge=0, le=1, description="Weight of the plain next-token loss in the second stage. KL has the rest."
    )
    redraw: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest share of a row's tokens that the original draws anew, each by what stands before it, so "
        "that little text lasts for many passes. Default: 0.5 for several passes over local text by KL alone.",
    )
    train: Train = Field(
        "all",
        description="What learns: the converted attention, that and all norms, all weights, or LoRA on attention. "
        "zero_points: LoRA on the zero points of packed "
        "weights, which rtn, hqq or gptq make with zeros: true; integers and scales stay.",
    )
    lora_rank: int = Field(16, ge=1, le=MOST, description="Rank of --train lora and zero_points.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate. Default: the best of a few short trials from the same start."
    )
    warmup: float = Field(0.05, ge=0, le=1, description="Share of a stage's steps over which the learning rate rises.")
    decay: Decay = Field("cosine", description="How the learning rate falls to 0 at a stage's end.")
    decay_share: float = Field(
        1.0, ge=0, le=1, description="Share of a stage's steps over which it falls. 1: all the remaining steps."
    )
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate; the first is 0.9.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    length: int = Field(1024, ge=8, le=MOST, description="Tokens per row (at most the model's context).")
    batch: int | None = Field(
        None, ge=1, le=MOST, description="Rows per step, over all processes. Default: what makes about 2000 steps."
    )
    micro_batch: int = Field(8, ge=1, le=MOST, description="Most rows at once on one device. Fewer save memory.")
    packing: bool = Field(True, description="Fill rows with several documents. None sees another.")
    precision: Precision | None = Field(
        None,
        description="float32. mixed: weights in float32, sums in bfloat16. bfloat16: weights too. "
        "Default: mixed on a GPU, otherwise float32.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, more time."
    )
    parallel: Parallel = Field(
        "ddp", description="With several processes, each holds all weights (ddp) or a part of them (fsdp)."
    )
    eval_every: int | None = Field(None, ge=1, le=MOST, description="Steps between scores. Default: a stage / 10.")
    save_every: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Steps between checkpoints. A stopped run goes on from the last. Default: a tenth of a stage.",
    )
    early_stop: int | None = Field(
        None, ge=1, le=MOST, description="End after this many scores without a better one. The best is taken anyway."
    )
    device: str = Field("auto", max_length=60, description="cpu, cuda, ...; auto takes a GPU if there is one.")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Random seed of the order of documents, of LoRA's start and of dropout."
    )

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
        if self.redraw and self.cross_entropy:
            raise ValueError("redraw changes the text, which cross_entropy learns from: one of them must be 0")
        return self

    @property
    def adapts(self) -> bool:
        """Whether adapters learn, and not the weights themselves."""
        return self.train in ("lora", "zero_points")

    @property
    def scored_by(self) -> str:
        """Which score is to fall."""
        return "eval_kl" if self.cross_entropy < 1 else "eval_perplexity"

    @property
    def learns_zeros(self) -> bool:
        """Whether zero points of packed weights learn, after the step that packs."""
        return self.train == "zero_points"

    def refuses(self, model: ModelSpec) -> str | None:
        """Without text there is nothing to learn from."""
        if self.learns_zeros and all(layer.zeros is None for layer in model.layers):
            return "train: zero_points: its weights have none: put rtn, hqq or gptq with zeros: true before it"
        return "it has no data: name a text to learn from" if self.data is None else None

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """The same model: only its weights change, and gates of mfa are folded at the end."""
        folded = (
            layer if layer.mfa is None else replace(layer, mfa=replace(layer.mfa, value_gate=False))
            for layer in model.layers
        )
        return Plan(after=replace(model, layers=tuple(folded)))

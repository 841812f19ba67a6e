"""The settings of the step `mla`."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from anymla.errors import RecipeError, UnsupportedModelError
from anymla.layouts import GRID_TARGETS, TARGETS, Target, listed
from anymla.methods.base import Method, Paper, Phase, Plan
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST, DtypeName

Rope = Literal[
    "channel-pca",
    "high",
    "low",
    "uniform",
    "two-norm",
    "elite",
    "rorope",
    "freqfold-2",
    "freqfold-4",
    "freqfold-8",
    "freqfold-16",
]
SHARED_ROPES = ("channel-pca", "rorope", "freqfold-2", "freqfold-4", "freqfold-8", "freqfold-16")  # by all KV heads
FactorizationName = Literal["output-aware", "joint-svd", "split-svd", "whitened", "balanced-pca"]


class MLA(Method):
    """Settings of one conversion. Only ``kv_cache`` matters to most users; all else is derived from it."""

    name: ClassVar[str] = "mla"
    paper: ClassVar[Paper] = Paper(title="DeepSeek-V2 (multi-head latent attention)", arxiv="2405.04434")
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "multi-head latent attention in place of keys and values of every head"
    saves: ClassVar[tuple[str, ...]] = ("cache",)

    kv_cache: float = Field(0.25, gt=0, le=1, description="Share of the original KV cache's bytes to keep, 0 < x <= 1.")
    target: Target | None = Field(
        None,
        description="Plan under the limits of this layout, so that `anymla export --to` it is exact: "
        f"{listed(TARGETS, 'or')}. Default: no limits, for transformers.",
    )
    rope: Rope = Field(
        "channel-pca",
        description="Which rope channels stay rotated: anymla's channel-pca; high, low, uniform, two-norm of MHA2MLA; "
        "elite of EliteKV; rorope and freqfold-N (N frequencies taken for equal) of TransMLA.",
    )
    rope_dims: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Rotated dims: per KV head for high/low/uniform/two-norm/elite, in total (2K) for the others. "
        "Default: chosen per layer on calibration text.",
    )
    kv_rank: int | None = Field(
        None, ge=1, le=MOST, description="Latent rank per layer. Default: what the budget leaves beside the rope dims."
    )
    exact_window: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Keep full keys and values of the last N tokens beside the latent, 2 or more: better by far, for a "
        "constant size. For transformers only: no engine's cache has room for them. 0: none.",
    )
    static_qk_norm: bool = Field(
        False,
        description=f"Let --target {listed(GRID_TARGETS, 'and')} take models with norms on queries and keys: a fixed "
        "scale per head, measured on calibration text, stands in for each. This changes the model; the loss is shown.",
    )
    factorization: FactorizationName = Field("output-aware", description="How the latent is found.")
    expected_rotation: bool = Field(
        True, description="Replace dropped rotations by their expectation on calibration text (the paper: by 1)."
    )
    reconstruction_steps: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Gradient steps per layer against the original layer's output, after output-aware; 0 for none. "
        "Default: 300, fewer for a model with more than 16 million attention weights, and at least 99.",
    )
    calibration: str | None = Field(
        None,
        min_length=1,
        description="Text file, .jsonl (field 'text') or hub data set name[:config[:split]]. Default: bundled stories.",
    )
    calibration_tokens: int = Field(32768, ge=256, le=MOST, description="Tokens of calibration text to use.")
    calibration_length: int = Field(
        1024, ge=8, le=MOST, description="Tokens per calibration window (at most the model's context)."
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="A peft adapter (a folder or a hub id) to merge into the original's weights first; none leaves out "
        "one that lies beside them. Default: that one, where there is one.",
    )
    device: str = Field(
        "auto", max_length=60, description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."
    )
    dtype: DtypeName | None = Field(
        None,
        description="Dtype to load, compute and save in. Default: the checkpoint's, computed in float32 where this CPU "
        "is faster in that.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Which pieces of the calibration text are drawn.")

    @field_validator("calibration", "adapter", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model has no latent attention under these settings."""
        from anymla.methods.mla.plan import make_plan

        if any(layer.latent is not None for layer in model.layers):
            return "it has latent attention already"
        try:
            make_plan("this model", model, self)
        except (RecipeError, UnsupportedModelError) as error:
            return str(error)
        return None

    def plan(
        self, model: ModelSpec, facts: list[dict[str, Any]] | None = None, choices: tuple[Any, ...] | None = None
    ) -> Plan:
        """A latent for every layer with softmax attention; the choices are of LayerPlan."""
        from anymla.methods.mla.plan import make_plan, spec_after

        planned = make_plan("this model", model, self)
        return Plan(after=spec_after(planned, model), choices=planned.layers)

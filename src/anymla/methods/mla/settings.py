"""The settings of the step `mla`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from anymla.engine_shapes import CACHE_TYPES
from anymla.errors import AnymlaError
from anymla.layouts import GRID_TARGETS, TARGETS, Target, listed
from anymla.methods.base import Changed, Facts, Paper, Phase, Plan, Survey
from anymla.methods.effort import EffortMethod
from anymla.methods.mla.factorization import FACTORIZATIONS, Factorization
from anymla.methods.mla.papers import DEEPSEEK
from anymla.methods.mla.ranks import RANKS
from anymla.methods.mla.rope import ROPE_CHOICES, RopeChoice
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer, Observer

    CacheType: TypeAlias = str
    Rope: TypeAlias = str
    FactorizationName: TypeAlias = str
    RankName: TypeAlias = str
else:
    Rope, FactorizationName = Literal[tuple(ROPE_CHOICES)], Literal[tuple(FACTORIZATIONS)]
    CacheType, RankName = Literal[CACHE_TYPES], Literal[RANKS]

SHARED_ROPES = tuple(name for name, choice in ROPE_CHOICES.items() if choice.shared)  # by all KV heads
PER_HEAD_ROPES = tuple(name for name, choice in ROPE_CHOICES.items() if not choice.shared)


def _credited(choices: Mapping[str, RopeChoice | Factorization]) -> str:
    """The names of all choices, by whose they are."""
    by: dict[str, list[str]] = {}
    for name, choice in choices.items():
        by.setdefault(choice.paper.title, []).append(name)
    return "; ".join(f"{', '.join(names)} of {title}" for title, names in by.items())


class MLA(EffortMethod):
    """Settings of one conversion. Only ``kv_cache`` matters to most users. All else is derived from it."""

    name: ClassVar[str] = "mla"
    paper: ClassVar[Paper] = DEEPSEEK
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "multi-head latent attention: a small latent replaces the keys and values of every head"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    example: ClassVar[dict[str, Any]] = {"kv_cache": 0.25}

    kv_cache: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of the original KV cache's bytes to keep, 0 < x <= 1. Below a quarter, latents lose "
        "much, and `anymla tune` recovers only part of it.",
    )
    target: Target | None = Field(
        None,
        description="Plan under the limits of this layout, so that `anymla export --to` it is exact: "
        f"{listed(TARGETS, 'or')}. Default: no limits, for transformers.",
    )
    cache_type: CacheType | None = Field(
        None,
        description="Plan sizes that a quantised cache of the target stores whole: q8_0 or q4_0 of llama.cpp, fp8 of "
        "vLLM and SGLang. anymla export takes the same option. Default: a cache of floats.",
    )
    rope: Rope = Field(
        "channel-pca",
        description=f"Which rope channels stay rotated: {_credited(ROPE_CHOICES)}. The default loses least "
        "(docs/fidelity.md).",
    )
    rope_dims: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description=f"Rotated dims: per KV head for {'/'.join(PER_HEAD_ROPES)}, in total (2K) for the others. "
        "Default: chosen per layer on calibration text.",
    )
    kv_rank: int | None = Field(
        None, ge=1, le=MOST, description="Latent rank per layer. Default: what the budget leaves beside the rope dims."
    )
    ranks: RankName = Field(
        "uniform",
        description="How the budget is spread over layers. uniform: the same for all. linear: from a full cache in the "
        "first layer down a straight line. lorc: by condition numbers of the weights. energy: by how much each layer "
        "adds. fisher: by gradients, as in Palu. A target has one size for all layers, so it takes uniform.",
    )
    exact_window: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Keep full keys and values of the last N tokens beside the latent, 2 or more. This is much better, "
        "for a constant size. It runs in transformers only. 0: none. Codes keep 16 by default.",
    )
    static_qk_norm: bool = Field(
        False,
        description=f"Let --target {listed(GRID_TARGETS, 'and')} take models with norms on queries and keys. A fixed "
        "scale per head, measured on calibration text, replaces each norm. This changes the model. The loss is shown.",
    )
    factorization: FactorizationName = Field(
        "output-aware",
        description=f"How the latent is found: {_credited(FACTORIZATIONS)}. The default loses least "
        "(docs/fidelity.md).",
    )
    expected_rotation: bool = Field(
        True,
        description="Replace dropped rotations by their expectation on calibration text (the paper: by 1). It costs "
        "nothing at run time.",
    )
    reconstruction_steps: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Gradient steps per layer against the original layer's output, after output-aware; 0: none. "
        "Default: 300. A large model takes fewer, so that a conversion stays short, but at least 99.",
    )

    def papers(self) -> tuple[Paper, Paper]:
        """Whose the rope choice and the factorisation are."""
        return ROPE_CHOICES[self.rope].paper, FACTORIZATIONS[self.factorization].paper

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model has no latent attention under these settings."""
        from anymla.methods.mla.layer_plan import check_settings

        if any(layer.latent is not None for layer in model.layers):
            return "it already has latent attention"
        if any(layer.kind is not None and layer.shared is None for layer in model.layers):
            return "its attention is not stock any more: put mla before the step that changed it"
        try:
            check_settings("this model", model, self)
        except AnymlaError as error:
            return str(error)
        return None

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """A latent for every layer with softmax attention; ``choices`` and those of the plan: LayerPlan."""
        from anymla.methods.mla.layer_plan import allotted, plan_layers, spec_after
        from anymla.methods.mla.split import agreed

        layers = plan_layers(model, self) if choices is None else choices
        if facts is not None:
            layers = agreed(allotted(layers, self, model, facts), self, model, facts)
        return Plan(after=spec_after(model, self, layers), choices=layers)

    @property
    def cache_option(self) -> str:
        """What `anymla export` must be told of the cache that was planned for."""
        return "" if self.cache_type is None else f" --cache-type {self.cache_type}"

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """What ranks go by, or what the splits that the target leaves open would lose; none where nothing is open."""
        from anymla.methods.mla.rank_survey import RANK_SURVEYS
        from anymla.methods.mla.split import open_splits
        from anymla.methods.mla.survey import SplitSurvey

        if any(layer is not None and layer.open_budget for layer in plan.choices):
            asked: Survey = RANK_SURVEYS[self.ranks](self)
            return asked
        first = next(layer for layer in plan.choices if layer is not None)
        splits = open_splits(first, self, model)
        return SplitSurvey(self, splits) if len(splits) > 1 else None

    def observer(self, layer: Layer) -> Observer:
        """Moments and targets."""
        from anymla.methods.mla.observe import AttentionObserver
        from anymla.methods.mla.values import ValueObserver

        return ValueObserver(layer) if layer.old.takes_map else AttentionObserver(self, layer)

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts latent attention in the place of the layer's own."""
        from anymla.methods.mla.choose import LayerFit
        from anymla.methods.mla.values import fit_values

        if layer.old.takes_map:
            return fit_values(layer, observed)
        measured = observed.measured()
        fit = LayerFit(self, layer, measured)
        best = fit.best()
        changed = Changed(spec=fit.spec(best.attention), result=asdict(fit.result(best)))
        layer.module.set_submodule(layer.attention_path, best.attention)
        measured.close()
        return changed

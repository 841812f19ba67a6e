"""The method `lorc`: keys and values of low rank by SVD of the weights, without any text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from anymla.methods.base import Changed, Facts, Paper, Phase, Plan, Survey, SweptMethod
from anymla.methods.ranks import Room, by_condition, by_depth, falling
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import AttentionSpec, LayerSpec, ModelSpec

if TYPE_CHECKING:
    from anymla.methods.lorc.weights import RopeHeard
    from anymla.sweep.layer import Layer

STEP, WIDE = 8, 256  # ranks are multiples of this, where keys have so many numbers


class LayerRank(BaseModel):
    """The rank that a layer's keys have, and its values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int


class LoRC(SweptMethod):
    """Settings of a cache of low rank that is made of the weights alone: no text is read, nothing is trained.

    W_k = U S V^T of all heads, and W_v, are cut after r_l numbers. The cache holds these of keys before rope and of
    values. Keys are rebuilt and turned when they are read; the second factor of values is applied behind attention.

    Deviations from the paper: ranks are by default the same in all layers, which loses less than the paper's
    ``progressive`` ones wherever it was measured. Those fall from the first layer to the last by cumulative condition
    numbers: nearly a straight line in depth. A condition number is the largest singular value over that at which 99.9 %
    of the energy is reached, for the smallest one of a trained matrix is noise. A byte budget takes the place of r_max
    and r_min. Keys that are normalised are encoded behind their norm, in axes of the weights times its gain.
    """

    name: ClassVar[str] = "lorc"
    paper: ClassVar[Paper] = Paper(title="LoRC", arxiv="2410.03111")
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "keys before rope and values of low rank by SVD of the weights, without any text"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    excludes: ClassVar[tuple[str, ...]] = ("mla", "transform_coding", "kvquant")

    kv_cache: float = Field(0.5, gt=0, le=1, description="Share of the original KV cache's bytes to keep, 0 < x <= 1.")
    ranks: Literal["uniform", "linear", "progressive"] = Field(
        "uniform",
        description="Ranks over depth: uniform; linear: from the full one down a straight line; progressive: the "
        "paper's.",
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why keys of this model cannot be cached before rope."""
        from anymla.methods.cache_coding.refusals import coded_refusal

        return coded_refusal(model)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """A rank for every layer with softmax attention; ``choices``: LayerRank. In a dry run progressive is linear."""
        widths = {index: spec.cached_numbers // 2 for index, spec in model.attention_layers.items()}
        if self.kv_cache == 1:
            return Plan(after=model, choices=(None,) * len(model.layers))
        step = STEP if min(widths.values()) >= WIDE else 1
        rooms = [Room(min(step, width), width) for width in widths.values()]
        ranks = falling(self._falls(widths, facts), rooms, self.kv_cache * sum(widths.values()), step)
        planned = dict(zip(widths, ranks, strict=True))
        layers = tuple(_low_rank(layer, planned.get(index)) for index, layer in enumerate(model.layers))
        chosen = tuple(LayerRank(rank=planned[index]) if index in planned else None for index in range(len(layers)))
        return Plan(after=replace(model, layers=layers), choices=chosen)

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """Condition numbers of the weights, where ranks go by them."""
        from anymla.methods.mla.rank_survey import ConditionSurvey

        return ConditionSurvey() if self.ranks == "progressive" else None

    def observer(self, layer: Layer) -> RopeHeard:
        """How fast rope turns each pair."""
        from anymla.methods.lorc.weights import RopeHeard

        return RopeHeard(layer)

    def apply(self, layer: Layer, observed: RopeHeard) -> Changed:
        """Puts an attention whose cache is of low rank in the place of the layer's own, unless its rank is full."""
        from anymla.methods.lorc.weights import build_low_rank

        result = {"layer": layer.index, "rank": layer.choice.rank}
        if layer.planned.coded is None:
            return Changed(spec=layer.old, result=result | {"weights_lost": 0.0})
        attention, lost = build_low_rank(layer, layer.planned.coded, observed)
        layer.module.set_submodule(layer.attention_path, attention)
        return Changed(spec=attention.layer_spec, result=result | {"weights_lost": lost})

    def _falls(self, places: dict[int, int], facts: Facts | None) -> list[float]:
        """How far each layer's rank falls from the largest to the smallest."""
        if self.ranks == "uniform":
            return [0.0] * len(places)
        if self.ranks == "linear" or not facts:
            return by_depth(len(places))
        known = [facts[index] or {} for index in places]
        return by_condition([sum(fact["condition"]) for fact in known])


def _low_rank(old: LayerSpec, rank: int | None) -> LayerSpec:
    """The layer as it will be: as it is, where its rank is full."""
    attention: AttentionSpec | None = old.attention
    if attention is None or rank is None or rank >= attention.cached_numbers // 2:
        return old
    coding = Coding(bits=((16, rank),), kind="plain")
    return replace(old, coded=CodedSpec(keys=coding, values=coding, first_tokens=0), attention_bytes=None)

"""The method `shared_attention`: layers that use the attention map of an earlier layer (arXiv 2407.12866)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anymla.methods.base import Changed, Chosen, Facts, LayerMethod, Look, Paper, Phase, Plan, Search
from anymla.methods.shared_attention.spans import (
    can_be_shared,
    is_met,
    latest,
    layers_in,
    sharing_refusal,
    source_of,
    spans_refusal,
)
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.shared_spec import SharedSpec
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer, Observer


class SharedLayer(BaseModel):
    """What becomes of a layer: the layer whose map it uses; None where it hands on its own.

    ``kl``: nats per token that the model lost with this layer and those that were chosen before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_layer: int | None = None
    kl: float | None = None


class ShareAttention(LayerMethod):
    """Settings of shared attention maps.

    A shared layer computes only values. It weights them by the attention map of an earlier layer, its source. It has no
    projections of queries and keys, and caches no keys. This saves little: sharing 4 of 32 layers takes 6 % off the
    cache. Other methods lose less at the same bytes, so no default uses this one.

    If mla follows, a shared layer gets a latent of its values alone. After mla, a shared layer keeps its latent and
    loses only the rope key, which saves less.

    Deviations from the paper: spans are chosen by the KL of the whole model, layer by layer, and not by the similarity
    of maps. Every layer names its source. That is the nearest one before it with a map of its own and the same heads,
    rope and window. The paper's code still projects queries in shared layers, and attends without fused kernels. Here
    prompts run through the usual kernels, on the source's queries and keys. A new token weights values by the source's
    row of probabilities. ``align_heads`` is not in the paper.
    """

    name: ClassVar[str] = "shared_attention"
    paper: ClassVar[Paper] = Paper(title="Beyond KV Caching: Shared Attention for Efficient LLMs", arxiv="2407.12866")
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "spans of layers that reuse the attention map of an earlier layer: no queries, no keys"
    saves: ClassVar[tuple[str, ...]] = ("cache", "weights", "compute")
    excludes: ClassVar[tuple[str, ...]] = ("transform_coding", "kvquant")
    example: ClassVar[dict[str, Any]] = {"kv_cache": 0.75}

    spans: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="Layers to share, as [[first, last], ...], both included and counted from 0."
    )
    layers: int | None = Field(
        None, ge=0, le=MOST, description="In place of spans: how many layers to share; a search chooses them."
    )
    kv_cache: float | None = Field(
        None,
        gt=0,
        le=1,
        description="In place of spans: bytes of the cache as a share of the original's; a search chooses the layers.",
    )
    align_heads: bool = Field(
        False, description="Put the heads of shared layers in the order in which the source's maps fit them best."
    )
    calibration_tokens: int = Field(8192, ge=256, le=MOST, description="Tokens of calibration text to use.")
    calibration_length: int = Field(
        512, ge=8, le=MOST, description="Tokens per calibration window (at most the model's context)."
    )

    @model_validator(mode="after")
    def _one_way(self) -> ShareAttention:
        if sum(given is not None for given in (self.spans, self.layers, self.kv_cache)) > 1:
            raise ValueError("give one of spans, layers and kv_cache")
        return self

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model cannot share attention maps, or these of its layers cannot."""
        if self.spans is None and self.layers is None and self.kv_cache is None:
            return "it needs to know which layers: give spans, layers or kv_cache"
        if (reason := sharing_refusal(model)) is not None:
            return reason
        if self.align_heads and any(layer.latent is not None for layer in model.layers):
            return "align_heads compares stock heads: leave it off after mla"
        return None if self.spans is None else spans_refusal(model, self.spans)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """Shared layers and their sources; ``facts``: of the layers that a search chose. ``choices``: SharedLayer."""
        if facts:
            lost = {index: fact["kl"] for index, fact in enumerate(facts) if fact is not None}
        elif self.spans is not None:
            lost = dict.fromkeys(layers_in(self.spans))
        else:
            lost = dict.fromkeys(latest(model, self.layers, self.kv_cache))
        return sharing_plan(model, lost)

    def search(self, model: ModelSpec) -> Search | None:
        """The search for the layers, where only their number or a size is given."""
        return None if self.spans is not None else SpanSearch(self, model)

    def observer(self, layer: Layer) -> Observer:
        """What it costs that a head attends by the map of another one, where heads are aligned."""
        from anymla.methods.base import Unheard
        from anymla.methods.shared_attention.align import HeadCosts

        choice: SharedLayer = layer.choice
        if self.align_heads and choice.source_layer is not None:
            return HeadCosts(layer, choice.source_layer)
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts an attention without queries and keys in the place of the layer's own, or one that hands its map on."""
        from anymla.methods.shared_attention.build import build_sharing
        from anymla.methods.shared_attention.latents import share_latent

        choice: SharedLayer = layer.choice
        order = observed.order() if self.align_heads and choice.source_layer is not None and observed else None
        shared = SharedSpec(source_layer=choice.source_layer)
        attention = build_sharing(layer, shared, order) if layer.old.latent is None else share_latent(layer, shared)
        layer.module.set_submodule(layer.attention_path, attention)
        result = {"layer": layer.index, "source_layer": choice.source_layer, "kl": choice.kl, "head_order": order}
        return Changed(spec=attention.layer_spec, result=result)


class SpanSearch(Search):
    """Adds the layer that costs the least KL, until enough are shared; the first two and the last two stay."""

    def __init__(self, method: ShareAttention, model: ModelSpec) -> None:
        self.method, self.model = method, model
        self.count = len(latest(model, method.layers, method.kv_cache))

    def candidates(self, chosen: Chosen, look: Look) -> list[Chosen]:
        """The layers that may be added to ``chosen``; none where these are enough."""
        given = self.method.layers
        done = len(chosen) >= given if given is not None else is_met(self.model, chosen, self.method.kv_cache)
        return [] if done else [{layer: {}} for layer in can_be_shared(self.model) if layer not in chosen]

    def plan(self, chosen: Chosen) -> Plan:
        """What the model is where these are shared."""
        return sharing_plan(self.model, dict.fromkeys(chosen))


def sharing_plan(model: ModelSpec, lost: dict[int, float | None]) -> Plan:
    """The plan where the layers in ``lost`` are shared; what each of them cost, where that is known.

    Raises:
        ValueError: one of them has no source.
    """
    sources = {index: _source(model, index, lost) for index in lost}
    chosen = {index: SharedLayer(source_layer=source, kl=lost[index]) for index, source in sources.items()}
    chosen |= {source: SharedLayer() for source in sources.values()}
    layers = tuple(
        _planned(layer, chosen[index]) if index in chosen else layer for index, layer in enumerate(model.layers)
    )
    return Plan(after=replace(model, layers=layers), choices=tuple(map(chosen.get, range(len(layers)))))


def _source(model: ModelSpec, layer: int, shared: Collection[int]) -> int:
    if (source := source_of(model, layer, shared)) is None:
        raise ValueError(f"no layer before {layer} has a map that it can use")
    return source


def _planned(old: LayerSpec, choice: SharedLayer) -> LayerSpec:
    made = replace(old, shared=SharedSpec(source_layer=choice.source_layer), attention_bytes=None)
    if (latent := old.latent) is None or old.attention is None or not made.takes_map:
        return made
    values = old.attention.cached_numbers // 2
    rank = min(latent.kv_lora_rank, values)
    return replace(made, latent=LatentSpec(kv_lora_rank=rank, qk_rope_head_dim=0, biases=latent.biases))

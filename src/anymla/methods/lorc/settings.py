"""The method `lorc`: keys and values of low rank, without any text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from anymla.errors import InfeasibleError
from anymla.methods.base import Changed, Facts, Paper, Phase, Plan, Survey, SweptMethod
from anymla.methods.ranks import Room, by_condition, by_depth, falling
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from anymla.methods.lorc.weights import Heard
    from anymla.sweep.layer import Layer

ROPE_SHARE = 0.3  # of the cached numbers, with partial rope
KEY_SHARE = "with rope: partial keys and values share one latent: leave key_share out"
STEP, WIDE = 8, 256  # ranks are multiples of this, where keys have so many numbers


class LayerRank(BaseModel):
    """The ranks of a layer's keys and values; of both together ``rope_dims`` numbers are turned by rope."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key_rank: int
    value_rank: int
    rope_dims: int = 0


class LoRC(SweptMethod):
    """Settings of a cache of low rank that is made without any text, and without training.

    W_k = U S V^T of all heads, and W_v, are cut after r_l numbers. The cache holds these numbers of values, and of keys
    before rope. Keys are rebuilt and rotated when they are read. The second factor of values is applied after
    attention.

    Deviations from the paper:

    - Ranks are by default the same in all layers. As long as the model stays useful, that loses less than the paper's
      ``progressive`` ranks (docs/benchmarks.md). Those fall from the first layer to the last by cumulative condition
      numbers, nearly in a straight line.
    - The condition number is the largest singular value over the one at which 99.9 % of the energy is reached. The
      smallest one of a trained matrix is noise.
    - A byte budget replaces r_max and r_min.
    - The paper does not say how rope is treated. With ``rope: partial``, pairs evenly spaced over the frequencies stay
      rotated, in 0.3 of the cache.
    - Keys that are normalised are encoded after their norm, in axes of the weights times its gain.
    - Axes are by default those of keys and values on random tokens, because singular vectors of weights overlook how
      large the inputs are (docs/benchmarks.md). ``axes: weights`` takes the singular vectors.
    """

    name: ClassVar[str] = "lorc"
    paper: ClassVar[Paper] = Paper(title="LoRC", arxiv="2410.03111")
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "keys before rope and values of low rank, without any text"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    excludes: ClassVar[tuple[str, ...]] = ("mla", "mfa", "shared_attention")

    kv_cache: float = Field(0.5, gt=0, le=1, description="Share of the original KV cache's bytes to keep, 0 < x <= 1.")
    ranks: Literal["uniform", "linear", "progressive"] = Field(
        "uniform",
        description="Ranks over depth. uniform: all equal. linear: from the full rank down a straight line. "
        "progressive: the paper's.",
    )
    key_share: float = Field(
        0.5, gt=0, lt=1, description="Share of a layer's numbers that its keys get; values get the others."
    )
    axes: Literal["random", "weights"] = Field(
        "random",
        description="Axes of the cache, with rope: reconstruct. random: principal axes of keys and values on random "
        "tokens. weights: singular vectors of the weights, as in the paper.",
    )
    rope: Literal["reconstruct", "partial"] = Field(
        "reconstruct",
        description="reconstruct: the latent of keys is cached before rope. Keys are rebuilt and rotated when they are "
        "read. partial: some pairs of every head stay rotated, and the latent of the others is read directly.",
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why keys of this model cannot be cached before rope, or as a latent."""
        from anymla.methods.cache_coding.refusals import coded_refusal

        if any(layer.kind is not None for layer in model.layers):
            return "its attention is converted already"
        if self.rope == "reconstruct":
            return coded_refusal(model)
        return None if self.key_share == 0.5 else KEY_SHARE

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """Sizes of every layer with softmax attention; ``choices``: LayerRank. In a dry run progressive is linear.

        Raises:
            InfeasibleError: the budget is less than what every layer needs.
        """
        if self.kv_cache == 1:
            return Plan(after=model, choices=(None,) * len(model.layers))
        specs = model.attention_layers
        widths = [spec.cached_numbers // 2 for spec in specs.values()]
        step = STEP if min(widths) >= WIDE else 1
        rooms = [Room(self._least(spec, step), spec.cached_numbers // 2) for spec in specs.values()]
        if sum(room.least for room in rooms) > (budget := self.kv_cache * sum(widths)):
            least = sum(room.least for room in rooms) / sum(widths)
            raise InfeasibleError(
                f"kv_cache {self.kv_cache:g} leaves too little for every layer: give at least {least + 5e-5:.4f}"
            )
        found = falling(self._falls(specs, facts), rooms, budget, step)
        ranks = {index: self._rank(spec, each) for (index, spec), each in zip(specs.items(), found, strict=True)}
        layers = tuple(self._after(layer, ranks.get(index)) for index, layer in enumerate(model.layers))
        return Plan(after=replace(model, layers=layers), choices=tuple(map(ranks.get, range(len(layers)))))

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """Condition numbers of the weights, where ranks go by them."""
        from anymla.methods.mla.rank_survey import ConditionSurvey

        return ConditionSurvey() if self.ranks == "progressive" else None

    def observer(self, layer: Layer) -> Heard:
        """How fast rope turns each pair, and what keys and values are on random tokens."""
        from anymla.methods.lorc.weights import Heard

        return Heard(layer)

    def apply(self, layer: Layer, observed: Heard) -> Changed:
        """Puts an attention whose cache is of low rank in the place of the layer's own, unless its rank is full."""
        from anymla.methods.lorc.partial import build_partial
        from anymla.methods.lorc.weights import build_low_rank

        result = {"layer": layer.index, **layer.choice.model_dump()}
        if layer.planned.kind is None:
            return Changed(spec=layer.old, result=result)
        attention: Any
        if (latent := layer.planned.latent) is not None:
            attention = build_partial(layer, latent, observed)
        else:
            attention = build_low_rank(layer, layer.planned.kind, observed, self.axes)
        layer.module.set_submodule(path := layer.attention_path, attention)
        spec = replace(attention.layer_spec, module=f"{layer.name}.{path}")
        return Changed(spec=spec, result=result)

    def _falls(self, places: Mapping[int, AttentionSpec], facts: Facts | None) -> list[float]:
        """How far each layer's rank falls from the largest to the smallest."""
        if self.ranks == "uniform":
            return [0.0] * len(places)
        if self.ranks == "linear" or not facts:
            return by_depth(len(places))
        known = [facts[index] or {} for index in places]
        return by_condition([sum(fact["condition"]) for fact in known])

    def _least(self, spec: AttentionSpec, step: int) -> int:
        """The smallest rank of keys, and of values. With partial rope, every head has a rotated pair as well."""
        turned = 2 * spec.num_kv_heads * (spec.rope_pairs > 0) if self.rope == "partial" else 0
        return min(max(step, turned), spec.cached_numbers // 2)

    def _rank(self, spec: AttentionSpec, rank: int) -> LayerRank:
        """The sizes of a layer that has ``rank`` numbers each for keys and values."""
        width, most = spec.cached_numbers // 2, 2 * rank - 1
        keys = min(width, most, max(1, 2 * rank - width, round(2 * rank * self.key_share)))
        if self.rope == "reconstruct" or not spec.rope_pairs:
            return LayerRank(key_rank=keys, value_rank=2 * rank - keys)
        pair = 2 * spec.num_kv_heads
        pairs = min(spec.rope_pairs, max(1, round(ROPE_SHARE * 2 * rank / pair)))
        return LayerRank(key_rank=keys, value_rank=2 * rank - keys, rope_dims=pair * pairs)

    def _after(self, old: LayerSpec, layer: LayerRank | None) -> LayerSpec:
        """The layer as it will be: as it is, where its rank is full."""
        if old.attention is None or layer is None:
            return old
        if (numbers := layer.key_rank + layer.value_rank) >= old.attention.cached_numbers:
            return old
        if self.rope == "partial":
            latent = LatentSpec(kv_lora_rank=numbers - layer.rope_dims, qk_rope_head_dim=layer.rope_dims)
            return replace(old, latent=latent, attention_bytes=None)
        keys, values = (Coding(bits=((16, rank),), kind="plain") for rank in (layer.key_rank, layer.value_rank))
        return replace(old, coded=CodedSpec(keys=keys, values=values, first_tokens=0), attention_bytes=None)

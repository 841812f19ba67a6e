"""The settings of the step `mfa`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from anymla.account import in_dtype
from anymla.architectures.families import FAMILIES, SINKS
from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan
from anymla.methods.mla.settings import MLA
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.methods.mla.layer_plan import LayerPlan
    from anymla.sweep.layer import Layer, Observer

SHARE = 0.25  # of the cache, where nothing is said


class MFA(LayerMethod):
    """Settings of attention with one wide head of keys and values for all heads of queries.

    After the step `mla`, with ``key_reuse``, it rewrites latent attention as MFA-KR, exactly and with the same cache.
    Every head then has large query and output matrices of its own, which `tune` can train. Without `mla` before it, it
    converts the original. The weights grow: the queries' matrices are H C by H d, for C cached numbers.

    At the same bytes, MFA is MFA-KR with zeros in its queries and outputs. So ``key_reuse`` loses less.

    Deviations from the paper, which trains from scratch:

    - Only the channels that rope needs most are rotated. Values read the others, so the cache holds each number once.
    - The original's scale of scores stays. Queries have a norm only if the original has one there.
    - The value map of key reuse is folded into the output projection. ``value_gate`` starts a new one.
    """

    name: ClassVar[str] = "mfa"
    paper: ClassVar[Paper] = Paper(title="Multi-matrix Factorization Attention", arxiv="2412.19255")
    phase: ClassVar[Phase] = Phase.ATTENTION
    summary: ClassVar[str] = "one wide head of keys and values for all heads, each with large query and output matrices"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    excludes: ClassVar[tuple[str, ...]] = ("shared_attention",)

    kv_cache: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Share of the original KV cache's bytes to keep, 0 < x <= 1. Default: {SHARE}; after mla its own.",
    )
    key_reuse: bool = Field(
        False, description="MFA-KR: the keys without rope are the values too. Otherwise values have their own numbers."
    )
    query_rank: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="How many numbers the queries of all heads are made of (the paper's Cq). Default: as many as the "
        "original's queries have, which is exact.",
    )
    value_gate: bool = Field(
        False,
        description="With key_reuse: a value map with a gate that starts closed, for `tune` to open. The end of `tune` "
        "folds it into the output projection.",
    )
    factorization: Literal["output-aware", "balanced-pca"] = Field(
        "output-aware",
        description="How the latent is found, without mla before: by what the output needs most, or by principal "
        "components of keys and values (of equal size).",
    )
    reconstruction_steps: int = Field(
        0, ge=0, le=1_000_000, description="Gradient steps per layer against the original layer's output."
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model has no factorised attention under these settings, from its config alone."""
        if (reason := _refused_attention(model)) is not None:
            return reason
        specs = model.attention_layers.values()
        if self.value_gate and not self.key_reuse:
            return "value_gate is for key_reuse, whose values it makes: set key_reuse: true"
        if self.factorization != "output-aware" and not self.key_reuse:
            return "factorization is for key_reuse, where keys and values share a latent: leave it out"
        most = min([model.hidden_size, *(spec.num_heads * spec.head_dim for spec in specs)])
        if self.query_rank is not None and self.query_rank > most:
            return f"query_rank {self.query_rank} is more than the {most} that are exact: leave it out"
        bent = FAMILIES[model.text_model_type].clip or any(spec.qk_norm or not spec.linear_queries for spec in specs)
        if self.query_rank is not None and bent:
            return (
                "it has norms or clips on queries, which a query_rank of its own would leave out: leave query_rank out"
            )
        if not any(layer.latent is not None for layer in model.layers):
            return self.as_mla().refuses(model)
        if any(layer.latent is not None and layer.latent.exact_window for layer in model.layers):
            return "its latent has an exact window, which has no place here: set mla's exact_window to 0"
        if not self.key_reuse:
            return "its latent holds keys and values together: set key_reuse: true"
        return "its cache is that of mla: leave kv_cache out" if self.kv_cache is not None else None

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """One head of keys for every layer with softmax attention; ``choices`` and those of the plan: LayerPlan."""
        layers = self._layers(model) if choices is None else choices
        after = tuple(self._after(old, layer) for old, layer in zip(model.layers, layers, strict=True))
        return Plan(after=in_dtype(replace(model, layers=after), self.dtype), choices=layers)

    def observer(self, layer: Layer) -> Observer:
        """Moments and targets of the original; nothing of a latent."""
        if layer.old.latent is not None:
            from anymla.methods.base import Unheard

            return Unheard()
        from anymla.methods.mla.observe import AttentionObserver

        return AttentionObserver(self.as_mla(), layer)

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts factorised attention in the place of the layer's own."""
        if layer.old.latent is not None:
            from anymla.methods.mfa.bridge import bridge_layer

            return bridge_layer(self, layer)
        from anymla.methods.mfa.fit import fit_layer

        return fit_layer(self, layer, observed)

    def spec(self, rank: int, rope_dims: int, value_rank: int, *, biases: bool = True) -> MfaSpec:
        """An attention under these settings."""
        return MfaSpec(
            kv_lora_rank=rank,
            qk_rope_head_dim=rope_dims,
            value_rank=0 if self.key_reuse else value_rank,
            q_lora_rank=self.query_rank,
            value_gate=self.value_gate,
            biases=biases,
        )

    def as_mla(self) -> MLA:
        """The conversion to latent attention that a direct one begins with."""
        shared = {name: getattr(self, name) for name in LayerMethod.model_fields}
        return MLA(
            kv_cache=self.kv_cache or SHARE,
            factorization=self.factorization,
            reconstruction_steps=self.reconstruction_steps,
            **shared,
        )

    def _layers(self, model: ModelSpec) -> tuple[LayerPlan | None, ...]:
        """Cached numbers, rope dims and rank of every layer: mla's own where it has a latent."""
        from anymla.methods.mla.layer_plan import LayerPlan, plan_layers

        if not any(layer.latent is not None for layer in model.layers):
            return plan_layers(model, self.as_mla())

        def kept(latent: LatentSpec) -> LayerPlan:
            rank, rope_dims = latent.kv_lora_rank, latent.qk_rope_head_dim
            return LayerPlan(cached_numbers=rank + rope_dims, rope_dims=rope_dims, kv_rank=rank)

        return tuple(None if layer.latent is None else kept(layer.latent) for layer in model.layers)

    def _after(self, old: LayerSpec, layer: LayerPlan | None) -> LayerSpec:
        """The layer as it will be; what is still to be chosen is typical."""
        from anymla.methods.mla.layer_plan import typical_split

        if layer is None:
            return old
        rope_dims, rank = typical_split(layer)
        biases = old.latent is None or old.latent.biases
        mfa = self.spec(rank, rope_dims, min(rank, layer.cached_numbers // 2), biases=biases)
        return replace(old, latent=None, mfa=mfa, attention_bytes=None)


def _refused_attention(model: ModelSpec) -> str | None:
    """What of the model's attention stands between heads and output, or after rope, where no matrix can be folded."""
    if any(layer.shared is not None for layer in model.layers):
        return "its layers share attention maps, which factorised attention does not hand on"
    if any(layer.kind is not None and layer.latent is None for layer in model.layers):
        return "its attention was converted already"
    beyond = FAMILIES[model.text_model_type].beyond
    if beyond not in (None, SINKS):
        return f"it has {beyond}, through which no matrix of mfa's can be folded: mla can have it"
    return None

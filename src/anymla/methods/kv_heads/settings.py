"""The method `kv_heads`: several KV heads become one, and queries and outputs make up for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from anymla.account import account
from anymla.errors import InfeasibleError
from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan
from anymla.methods.kv_heads.refusals import kv_heads_refusal
from anymla.modeling.grouped_spec import GroupedSpec
from anymla.modeling.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer, Observer

Variant = Literal["freq", "post", "values", "mean"]
STOCK = ("freq", "mean")  # variants whose checkpoints are stock ones


class KVHeads(LayerMethod):
    """Settings of a model with fewer KV heads.

    The KV heads of a group share one. Its keys and values are principal components of those of the group on calibration
    text, as many numbers as one head has. The query projections and the output projection of the group absorb the map
    back. So scores and outputs lose only the components that are left out. Biases take part in the analysis, and it is
    not centred. A model that already has fewer KV heads than query heads can get fewer still.

    - ``freq`` mixes keys within one rope frequency only, as complex numbers, which commutes with rope. The result is a
      stock checkpoint: only its ``num_key_value_heads`` is new.
    - ``post`` compresses keys after rope, as in the paper. The attention is anymla's own, and the cache is as small.
    - ``values`` changes values alone, for models whose keys have a norm. The attention is anymla's own.
    - ``mean`` takes means of the group's key and value weights, without compensation (Ainslie et al., arXiv
      2305.13245). It is the baseline, a stock checkpoint too, and needs training.

    Deviations from the paper: ``freq`` is anymla's own. It is the default, because its checkpoint is stock. On
    stories260K it loses less than the paper's ``post``, and on SmolLM2-135M far more (docs/benchmarks.md). Errors are
    weighted by the queries and output weights that read them. With ``weighting: none`` components are the paper's plain
    ones. ``grouping: overlap`` groups heads that are alike. The paper trains the result with LoRA. Here the step
    ``tune`` can follow.
    """

    name: ClassVar[str] = "kv_heads"
    paper: ClassVar[Paper] = Paper(title="Effectively Compress KV Heads for LLM", arxiv="2406.07056")
    phase: ClassVar[Phase] = Phase.WIDTH
    summary: ClassVar[str] = "fewer KV heads in a stock checkpoint: every group of heads shares one"
    saves: ClassVar[tuple[str, ...]] = ("cache", "weights")
    example: ClassVar[dict[str, Any]] = {"kv_heads": 1}

    kv_heads: int | None = Field(
        None, ge=1, le=1024, description="KV heads to keep, a divisor of those there are. Default: by kv_cache."
    )
    kv_cache: float | None = Field(
        None, gt=0, le=1, description="Share of the KV cache's bytes to keep, 0 < x <= 1. Default: 0.5."
    )
    variant: Variant = Field("freq", description="What is shared: freq, post, values or mean, as described above.")
    svd: Literal["activations", "weights"] = Field(
        "activations", description="Components of keys and values on calibration text, or of the weights alone."
    )
    weighting: Literal["energy", "none"] = Field(
        "energy",
        description="Weight errors by the queries and output weights that read them; none: all equal, as in the paper.",
    )
    grouping: Literal["adjacent", "overlap"] = Field(
        "adjacent", description="Groups of neighbours, or of heads that have the most in common."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> KVHeads:
        if self.kv_heads is not None and self.kv_cache is not None:
            raise ValueError("kv_heads and kv_cache say the same: give one of them")
        if self.variant == "post" and self.svd == "weights":
            raise ValueError("variant post compresses rotated keys, which no weights hold: svd must be activations")
        return self

    def refuses(self, model: ModelSpec) -> str | None:
        """Why heads of this model cannot be shared so."""
        return kv_heads_refusal(model, self.variant, self.grouping)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """The same number of KV heads for every layer, as configs have one for all; ``choices``: KV heads."""
        kept = self._kept(model)
        choices = tuple(None if layer.attention is None else kept for layer in model.layers)
        return Plan(after=self._after(model, kept), choices=choices)

    def observer(self, layer: Layer) -> Observer:
        """Sums what the heads hold; nothing where their weights say it all."""
        from anymla.methods.base import Unheard
        from anymla.methods.kv_heads.moments import HeadSums

        if self.variant == "mean" or self.svd == "weights":
            return Unheard()
        return HeadSums(layer, rotated=self.variant == "post")

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts an attention with fewer KV heads in the place of the layer's own."""
        from anymla.methods.kv_heads.build import share

        return share(layer, self, observed)

    def _kept(self, model: ModelSpec) -> int:
        """How many KV heads are kept.

        Raises:
            InfeasibleError: no number of them is as asked for.
        """
        heads = next(iter(model.attention_layers.values())).num_kv_heads
        possible = [count for count in range(heads, 0, -1) if heads % count == 0]
        if self.kv_heads is not None:
            if self.kv_heads not in possible:
                known = ", ".join(map(str, possible))
                raise InfeasibleError(f"kv_heads {self.kv_heads} does not divide the model's {heads}: take {known}")
            return self.kv_heads
        asked, whole = self.kv_cache or 0.5, account(model).cache_bytes_per_token
        shares = {count: account(self._after(model, count)).cache_bytes_per_token / whole for count in possible}
        if (kept := next((count for count, share in shares.items() if share <= asked), None)) is None:
            raise InfeasibleError(f"kv_cache {asked} is less than one KV head takes: the least is {shares[1]:.4g}")
        return kept

    def _after(self, model: ModelSpec, kept: int) -> ModelSpec:
        return replace(model, layers=tuple(self._shared(layer, kept) for layer in model.layers))

    def _shared(self, old: LayerSpec, kept: int) -> LayerSpec:
        """The layer with ``kept`` KV heads."""
        if (attention := old.attention) is None:
            return old
        if self.variant in STOCK:
            fewer = replace(attention, num_kv_heads=kept, cached_heads=kept if attention.cached_heads else 0)
            return replace(old, attention=fewer, attention_bytes=None)
        grouped = GroupedSpec(kv_heads=kept, shares_keys=self.variant == "post")
        return replace(old, grouped=grouped, attention_bytes=None)

"""The method `saap`: narrower layers, without the neurons, heads and latent channels that matter least."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from anymla.architectures.families import FAMILIES
from anymla.errors import InfeasibleError
from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan, Survey, Unheard
from anymla.methods.saap.refusals import REFUSALS, attention_refusal
from anymla.modeling.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer, Observer

KINDS = ("neurons", "heads", "experts", "latent")
ROUNDED = ("neurons", "latent")  # to multiples


class LayerWidth(BaseModel):
    """How many structures of each kind a layer keeps, and which go; those are not known in a dry run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kept: dict[str, int]
    gone: dict[str, list[int]] = {}


class SAAP(LayerMethod):
    """Settings of a narrower model.

    It removes the structures that the loss needs least. These are FFN neurons, KV groups with all of their query heads,
    and experts with their rows of the router. Latent channels of a model that the step mla made can go too. All other
    weights stay the same. So removing a structure is the same as setting its weights to zero. A removed expert is like
    one that is never chosen. Every layer keeps the same number, as stock configs need. A model in anymla's own format
    stays one, and fewer latent channels make its cache smaller.

    Importance is summed over the rows and columns w of a structure. Gradients g are of the mean loss on calibration
    text, F is the mean of the squared gradients of single windows.

    - ``vector``: |sum_k g_k w_k|.
    - ``element``: sum_k |g_k w_k - w_k F_k w_k / 2|.
    - ``fused``: both, as outputs with their own noise. That divides each by its mean.
    - ``magnitude``: sum_k w_k^2, without text. ``random``: by ``seed``. Both are baselines.

    Deviations from the paper: only its overview could be read, so this is our own form of it. The default is
    ``element``. It loses less than the paper's ``fused`` on every model that was measured (docs/benchmarks.md). The
    noise of the two scores is found in closed form, over the structures of one kind in all layers. All layers get the
    same width. The paper's search for a width per layer would need a config of its own, and so would layers that are
    left alone. Latent channels are anymla's own addition. The paper trains quantised groups afterwards. Here the step
    ``tune`` can follow.
    """

    name: ClassVar[str] = "saap"
    paper: ClassVar[Paper] = Paper(title="SAAP", arxiv="2412.15127")
    phase: ClassVar[Phase] = Phase.WIDTH
    summary: ClassVar[str] = "fewer FFN neurons, heads, experts or latent channels: the least needed are removed"
    saves: ClassVar[tuple[str, ...]] = ("weights", "cache", "compute")

    neurons: float = Field(0.8, gt=0, le=1, description="Share of the FFN neurons of every layer to keep, 0 < x <= 1.")
    heads: float = Field(
        1.0, gt=0, le=1, description="Share of the KV heads to keep, each with all query heads that read it."
    )
    experts: float = Field(1.0, gt=0, le=1, description="Share of the experts of every mixture of experts to keep.")
    latent: float = Field(
        1.0, gt=0, le=1, description="Share of the latent's channels to keep, in a model that the step mla made."
    )
    importance: Literal["fused", "vector", "element", "magnitude", "random"] = Field(
        "element",
        description="How the importance of a structure is measured: fused, vector, element, magnitude or random.",
    )
    multiple: int = Field(
        64,
        ge=1,
        le=1024,
        description="Numbers of neurons and of latent channels are rounded to multiples of this, for fast kernels.",
    )
    allocation: Literal["uniform"] = Field(
        "uniform", description="How widths are spread over layers. Configs of transformers allow only uniform."
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why structures of this model cannot be removed."""
        reasons = (attention_refusal(model), *(REFUSALS[kind](model) for kind in self._asked()))
        return next((reason for reason in reasons if reason is not None), None)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """The same number of neurons and heads for every layer; ``choices``: LayerWidth.

        Raises:
            InfeasibleError: no width is near what was asked for.
        """
        kept = [self._kept(model, layer) for layer in model.layers]
        if not any(kept):
            return Plan(after=model, choices=(None,) * len(kept))
        neurons, experts = (
            next((each[kind] for each in kept if kind in each), whole)
            for kind, whole in (("neurons", model.intermediate_size), ("experts", model.routed_experts))
        )
        layers = tuple(_narrower(layer, each) for layer, each in zip(model.layers, kept, strict=True))
        after = replace(model, intermediate_size=neurons, routed_experts=experts, layers=layers)
        gone = [dict[str, list[int]]() for _ in kept] if facts is None else self._gone(model, kept, facts)
        widths = (LayerWidth(kept=each, gone=least) if each else None for each, least in zip(kept, gone, strict=True))
        return Plan(after=after, choices=tuple(widths))

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """Gradients, or the weights alone, of what is to be removed; nothing where chance says it."""
        from anymla.methods.saap.scores import MagnitudeSurvey, TaylorSurvey

        if self.importance == "random":
            return None
        kind = MagnitudeSurvey if self.importance == "magnitude" else TaylorSurvey
        return kind(self._asked())

    def observer(self, layer: Layer) -> Observer:
        """Nothing: what goes is known."""
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Takes the structures out of the layer."""
        from anymla.methods.saap.build import shrink

        result = {kind: layer.choice.kept[kind] for kind in shrink(layer, layer.choice.gone)}
        return Changed(spec=layer.planned, result={"layer": layer.index, **result})

    def _asked(self) -> list[str]:
        """The kinds of structures of which some are to be removed."""
        return [kind for kind in KINDS if getattr(self, kind) < 1]

    def _kept(self, model: ModelSpec, layer: LayerSpec) -> dict[str, int]:
        """How many structures of each kind that loses some are kept in a layer."""
        wholes = {kind: whole for kind in self._asked() if (whole := structures(model, layer, kind))}
        return {kind: self._nearest(kind, whole, model, layer) for kind, whole in wholes.items()}

    def _nearest(self, kind: str, whole: int, model: ModelSpec, layer: LayerSpec) -> int:
        share: float = getattr(self, kind)
        step = self.multiple if kind in ROUNDED else 1
        least = max(step, model.experts_per_token if kind == "experts" else 1)
        possible = [count for count in range(least, whole, step) if kind != "heads" or _sayable(count, model, layer)]
        if not possible:
            hint = f": choose another multiple than {step}" if kind in ROUNDED else ""
            raise InfeasibleError(f"{kind} {share:g}: no fewer than its {whole} can be kept{hint}, or {kind} 1.0")
        return min(possible, key=lambda count: (abs(count - share * whole), -count))

    def _gone(self, model: ModelSpec, kept: Sequence[dict[str, int]], facts: Facts) -> list[dict[str, list[int]]]:
        """Which structures of each layer are removed: those that matter least."""
        gone = [dict[str, list[int]]() for _ in kept]
        for kind in self._asked():
            order = self._orders(model, kind, facts)
            for index, each in enumerate(kept):
                if kind in each:
                    whole = structures(model, model.layers[index], kind)
                    gone[index][kind] = sorted(order[index][: whole - each[kind]])
        return gone

    def _orders(self, model: ModelSpec, kind: str, facts: Facts) -> list[list[int]]:
        """The structures of every layer, the least important first."""
        if self.importance == "random":
            wholes = [range(structures(model, layer, kind)) for layer in model.layers]
            return [
                random.Random(f"{self.seed} {kind} {index}").sample(whole, len(whole))
                for index, whole in enumerate(wholes)
            ]
        from anymla.methods.saap.scores import fused

        found = fused(facts, kind, self.importance)
        return [[] if scores is None else scores.argsort(stable=True).tolist() for scores in found]


def structures(model: ModelSpec, layer: LayerSpec, kind: str) -> int:
    """How many structures of a kind a layer has."""
    if kind == "neurons":
        return model.intermediate_size
    if kind == "experts":
        return model.routed_experts
    if kind == "latent":
        return 0 if layer.latent is None else layer.latent.kv_lora_rank
    return 0 if layer.attention is None else layer.attention.num_kv_heads


def _sayable(groups: int, model: ModelSpec, layer: LayerSpec) -> bool:
    """Whether a config of the family can say so many KV heads with their query heads."""
    if FAMILIES[model.text_model_type].fewer_heads != "divide" or layer.attention is None:
        return True
    return model.hidden_size % (groups * layer.attention.num_heads // layer.attention.num_kv_heads) == 0


def _narrower(layer: LayerSpec, kept: dict[str, int]) -> LayerSpec:
    """The layer as it will be."""
    if "neurons" in kept or "experts" in kept:
        layer = replace(layer, other_bytes=None)
    if (attention := layer.attention) is not None and (groups := kept.get("heads")) is not None:
        fewer = replace(
            attention,
            num_heads=groups * attention.num_heads // attention.num_kv_heads,
            num_kv_heads=groups,
            cached_heads=groups if attention.cached_heads else 0,
            gate=attention.gate * groups // attention.num_kv_heads,
        )
        layer = replace(layer, attention=fewer, attention_bytes=None)
    if (latent := layer.latent) is not None and (rank := kept.get("latent")) is not None:
        layer = replace(layer, latent=replace(latent, kv_lora_rank=rank))
    return layer

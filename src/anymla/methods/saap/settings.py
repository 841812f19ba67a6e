"""The method `saap`: narrower layers, without the neurons, heads and latent channels that matter least."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from anymla.errors import InfeasibleError
from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan, Survey, Unheard
from anymla.methods.saap.allocation import allocated, even, floor_of, of_scores
from anymla.methods.saap.refusals import REFUSALS, attention_refusal, own_width_refusal
from anymla.methods.saap.widths import narrower, sayable, structures
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.sweep.layer import Layer, Observer

KINDS = ("neurons", "heads", "experts", "latent")
ROUNDED = ("neurons", "latent")  # to multiples
FIRST, LAST = 8, 16  # one of so many layers is protected, as LLM-Pruner leaves 4 and 2 of 32


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
    one that is never chosen. By default every layer keeps the same number, as stock configs need. A model in anymla's
    own format stays one, and fewer latent channels make its cache smaller.

    ``allocation: global`` and ``fluctuation`` give every layer a width of its own, in anymla's format. All layers
    together keep as many structures as uniform ones. A layer keeps at least a quarter.

    Importance is summed over the rows and columns w of a structure. Gradients g are of the mean loss on calibration
    text, F is the mean of the squared gradients of single windows.

    - ``vector``: |sum_k g_k w_k|.
    - ``element``: sum_k |g_k w_k - w_k F_k w_k / 2|.
    - ``fused``: both, as outputs with their own noise. That divides each by its mean.
    - ``magnitude``: sum_k w_k^2, without text. ``random``: by ``seed``. Both are baselines.

    Deviations from the paper: only its overview could be read, so this is our own form of it. The default is
    ``element``. In uniform widths it loses less than the paper's ``fused`` on every model that was measured. The
    noise of the two scores is found in closed form, over the structures of one kind in all layers. The default
    allocation is ``uniform``, because it leaves a stock checkpoint. What the paper's fluctuation indicator is could not
    be read. Here it is the standard deviation of a layer's importance, by which that is divided. Each kind of structure
    has a budget of its own. Protected layers are LLM-Pruner's (arXiv 2305.11627). Latent channels are anymla's own
    addition. For the paper's training of quantised groups, pack with ``zeros: true`` and let ``tune`` learn the
    ``zero_points``.
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
    allocation: Literal["uniform", "global", "fluctuation"] = Field(
        "uniform",
        description="How widths are spread over layers, whose sum stays the same. uniform: all keep the same share, in "
        "a stock checkpoint. global: the most important structures of all layers stay. fluctuation: the same, by "
        "importance relative to the layer's own. The last two need anymla's own format.",
    )
    protect_first: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="First layers that stay whole, for which the others lose more. Any makes a checkpoint of anymla's "
        "own format. Default: an eighth of all layers; none with allocation: uniform.",
    )
    protect_last: int | None = Field(
        None, ge=0, le=MOST, description="The same of the last layers. Default: a sixteenth of all layers; or none."
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why structures of this model cannot be removed."""
        reasons = [attention_refusal(model), *(REFUSALS[kind](model) for kind in self._asked())]
        if self._own_widths(model):
            reasons.append(own_width_refusal(model))
        return next((reason for reason in reasons if reason is not None), None)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """How many structures every layer keeps; in a dry run near the same share. ``choices``: LayerWidth.

        Raises:
            InfeasibleError: no width is near what was asked for.
        """
        kept = self._kept(model, facts)
        if not any(kept):
            return Plan(after=model, choices=(None,) * len(kept))
        own, after = self._own_widths(model), model
        if not own:
            neurons, experts = (
                next((each[kind] for each in kept if kind in each), whole)
                for kind, whole in (("neurons", model.intermediate_size), ("experts", model.routed_experts))
            )
            after = replace(model, intermediate_size=neurons, routed_experts=experts)
        layers = (narrower(layer, each, own) for layer, each in zip(model.layers, kept, strict=True))
        gone = [dict[str, list[int]]() for _ in kept] if facts is None else self._gone(model, kept, facts)
        widths = (LayerWidth(kept=each, gone=least) if each else None for each, least in zip(kept, gone, strict=True))
        return Plan(after=replace(after, layers=tuple(layers)), choices=tuple(widths))

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
        from anymla.architectures.stock_config import own_width
        from anymla.methods.saap.build import shrink

        narrow = own_width(layer.config, layer.planned, layer.name)
        result = {kind: layer.choice.kept[kind] for kind in shrink(layer, narrow, layer.choice.gone)}
        return Changed(spec=narrow, result={"layer": layer.index, **result})

    def told(self, plan: Plan) -> str:
        """How many structures every layer keeps, where it is not the same number."""
        kept = {index: choice.kept for index, choice in enumerate(plan.choices) if choice is not None}
        kinds = [kind for kind in KINDS if any(kind in each for each in kept.values())]
        if len({tuple(each.items()) for each in kept.values()}) < 2 and len(kept) == len(plan.choices):
            return ""
        rows = [
            f"| {index} | {' | '.join(str(kept.get(index, {}).get(kind, 'all')) for kind in kinds)} |"
            for index in range(len(plan.choices))
        ]
        return "\n".join([f"| layer | {' | '.join(kinds)} |", f"|---:|{'---:|' * len(kinds)}", *rows])

    def _asked(self) -> list[str]:
        """The kinds of structures of which some are to be removed."""
        return [kind for kind in KINDS if getattr(self, kind) < 1]

    def _protected(self, model: ModelSpec) -> set[int]:
        """The layers that stay whole."""
        total, own = len(model.layers), self.allocation != "uniform"
        first, last = (
            total // share * own if given is None else given
            for given, share in ((self.protect_first, FIRST), (self.protect_last, LAST))
        )
        return {index for index in range(total) if index < first or index >= total - last}

    def _own_widths(self, model: ModelSpec) -> bool:
        """Whether layers have widths of their own, which no config of transformers says."""
        return self.allocation != "uniform" or bool(self._protected(model))

    def _kept(self, model: ModelSpec, facts: Facts | None) -> list[dict[str, int]]:
        """How many structures each layer keeps of each kind of which it loses some."""
        found, own = [dict[str, int]() for _ in model.layers], self._own_widths(model)
        for kind in self._asked():
            wholes = {
                index: whole
                for index, layer in enumerate(model.layers)
                if (whole := structures(model, layer, kind)) and not (own and self._has_none(kind, index, facts))
            }
            counts = {index: self._nearest(kind, whole, model, index) for index, whole in wholes.items()}
            if counts and own:
                counts = self._spread(kind, wholes, sum(counts.values()), model, facts)
            for index, count in counts.items():
                if count < wholes[index]:
                    found[index][kind] = count
        return found

    def _has_none(self, kind: str, index: int, facts: Facts | None) -> bool:
        """Whether the survey found no such structure in a layer, such as a dense layer below a mixture's."""
        if not facts or self.importance == "random":
            return False
        return not any(name.startswith(f"{kind}.") for name in facts[index] or ())

    def _spread(
        self, kind: str, wholes: dict[int, int], budget: int, model: ModelSpec, facts: Facts | None
    ) -> dict[int, int]:
        """What each layer keeps of a kind, by its number: all layers together as many as uniform ones would."""
        protected = self._protected(model)
        free = [index for index in wholes if index not in protected]
        step = self.multiple if kind in ROUNDED else 1
        least = [floor_of(wholes[index], step, self._needed(kind, model)) for index in free]
        left = budget - sum(wholes[index] for index in wholes if index in protected)
        if left < sum(least):
            raise InfeasibleError(
                f"{kind} {getattr(self, kind):g}: the layers that are not protected would keep {left} in all, and "
                f"{sum(least)} is their least: keep more, or lower protect_first or protect_last"
            )
        worths = even([wholes[index] for index in free])
        if facts is not None and self.allocation != "uniform" and self.importance != "random":
            scores = self._scores(kind, facts)
            known = [scores[index] for index in free]
            worths = of_scores([each for each in known if each is not None], standardised=self.allocation != "global")
        return wholes | dict(zip(free, allocated(worths, least, left, step), strict=True))

    def _needed(self, kind: str, model: ModelSpec) -> int:
        return max(1, model.experts_per_token if kind == "experts" else 1)

    def _nearest(self, kind: str, whole: int, model: ModelSpec, index: int) -> int:
        """How many of ``whole`` structures a layer keeps where all keep the same share."""
        share: float = getattr(self, kind)
        step = self.multiple if kind in ROUNDED else 1
        least, layer = max(step, self._needed(kind, model)), model.layers[index]
        possible = [count for count in range(least, whole, step) if kind != "heads" or sayable(count, model, layer)]
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
        return [[] if each is None else each.argsort(stable=True).tolist() for each in self._scores(kind, facts)]

    def _scores(self, kind: str, facts: Facts) -> list[Tensor | None]:
        """Importance of the structures of every layer; None in one that has none of them."""
        from anymla.methods.saap.scores import fused

        return fused(facts, kind, self.importance)

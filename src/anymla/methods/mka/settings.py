"""The method `mka`: fewer layers, dropped or merged into their neighbours (arXiv 2406.16330)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from anymla.errors import InfeasibleError
from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan, Unheard
from anymla.methods.mka.search import DepthLayer, DepthSearch, alike_pairs, depth_plan
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class MKA(LayerMethod):
    """Settings of a model with fewer layers. It stays a stock checkpoint, which every engine reads.

    A removed layer saves its weights, its compute and its part of the cache. By default, layers are dropped one after
    the other, always the one that costs the model the least KL. On stories260K that loses less than all other
    strategies. On SmolLM2-135M ``influence`` and ``angular`` lose no more, and are faster (docs/benchmarks.md).

    ``strategy: merge`` is MKA: the two neighbours with the most similar outputs become one layer. Outputs are states of
    each window's last token. Their similarity is the normalised information bottleneck of their diffusion maps. Merged
    layers run again before the next pair is chosen.

    The other strategies are baselines. ``last`` drops the last layers. ``influence`` is ShortGPT's block influence
    (arXiv 2403.03853). ``angular`` drops the block of layers with the least angle between its input and its output
    (arXiv 2403.17887).

    Deviations from the paper: the authors' code never writes a merged weight, always takes the last two layers, and
    compares 57 tokens of one question. Its result is ``strategy: last``. Here pairs are chosen by the text of the
    paper, over all calibration windows. The kernel's width is the median distance, and not 8. The gain of a norm is
    folded into the projections that read it before they are averaged. Entropies are limited to below zero. ``weight:
    code`` is what the formula of the code gives for nearly every pair. ``weight: delta`` is LaCo's sum of differences
    (arXiv 2402.11187). Of two layers it keeps the second. ``weight: search`` is not in the paper.
    """

    name: ClassVar[str] = "mka"
    paper: ClassVar[Paper] = Paper(title="Pruning via Merging (MKA)", arxiv="2406.16330")
    phase: ClassVar[Phase] = Phase.DEPTH
    summary: ClassVar[str] = "fewer layers: the cheapest ones are dropped, or merged into their neighbours"
    saves: ClassVar[tuple[str, ...]] = ("cache", "weights", "compute")
    example: ClassVar[dict[str, Any]] = {"remove": 2}

    remove: int | None = Field(None, ge=0, le=MOST, description="Layers to remove.")
    layers: int | None = Field(None, ge=1, le=MOST, description="In place of remove: layers to keep.")
    ratio: float | None = Field(
        None, ge=0, lt=1, description="In place of remove: layers to remove, as a share of all; rounded."
    )
    strategy: Literal["kl", "last", "influence", "angular", "merge"] = Field(
        "kl",
        description="kl: drop the layer that costs the least KL, one after the other. last: drop the last ones. "
        "influence: drop those that change the direction of states the least. angular: drop the block that changes it "
        "the least. merge: merge neighbours with similar outputs.",
    )
    weight: Literal["similarity", "code", "search", "delta", "drop"] = Field(
        "search",
        description="With strategy: merge, the first layer's weight in a pair. similarity: how similar both are. code: "
        "0.62. search: what costs the least KL, never more than dropping the second one. delta: the sum of differences "
        "to the first. drop: 1.",
    )
    kernel: Literal["gaussian", "sqrt"] = Field(
        "gaussian", description="With strategy: merge, the kernel of diffusion maps. sqrt is that of the authors' code."
    )
    protect_first: int = Field(2, ge=0, le=MOST, description="First layers that stay unchanged.")
    protect_last: int = Field(1, ge=0, le=MOST, description="Last layers that stay unchanged.")
    calibration_tokens: int = Field(8192, ge=256, le=MOST, description="Tokens of calibration text to use.")
    calibration_length: int = Field(
        128,
        ge=8,
        le=MOST,
        description="Tokens per calibration window (at most the context). Outputs are compared at the last one.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> MKA:
        if sum(given is not None for given in (self.remove, self.layers, self.ratio)) > 1:
            raise ValueError("give one of remove, layers and ratio")
        return self

    def refuses(self, model: ModelSpec) -> str | None:
        """Why no layer of this model can go, or cannot be merged."""
        if self.remove is None and self.layers is None and self.ratio is None:
            return "it is not told how many layers: give remove, layers or ratio"
        if any(layer.kind is not None for layer in model.layers):
            return "its attention is converted already: remove layers before that"
        if any(layer.width is not None for layer in model.layers):
            return "its layers have widths of their own: remove layers before the step saap"
        if model.has_vision:
            return "images enter layers of a vision-language model by their numbers"
        if self.strategy == "merge" and not _plain(model):
            return (
                f"layers of '{model.text_model_type}' are not built as Llama's are, so nothing says where gains of "
                "their norms go when they are merged: choose another strategy"
            )
        return None

    def removed_of(self, model: ModelSpec) -> int:
        """How many layers of ``model`` go.

        Raises:
            InfeasibleError: so many cannot.
        """
        total, free = len(model.layers), self.free(model)
        most = len(alike_pairs(model, free)) if self.strategy == "merge" else len(self.first_of(model, free, total))
        wanted = self.remove or 0
        if self.layers is not None:
            wanted = total - self.layers
        elif self.ratio is not None:
            wanted = round(self.ratio * total)
        if not 0 <= wanted <= most:
            raise InfeasibleError(
                f"of {total} layers {wanted} cannot go: with strategy: {self.strategy}, protect_first "
                f"{self.protect_first} and protect_last {self.protect_last} at most {most} can"
            )
        if self.strategy == "angular" and not self.blocks(model, wanted):
            raise InfeasibleError(
                f"every block of {wanted} layers holds all that have softmax attention: choose another strategy"
            )
        return wanted

    def free(self, model: ModelSpec, gone: Collection[int] = ()) -> list[int]:
        """The layers that may go next: not protected, and not the last one with softmax attention."""
        attending = [index for index in model.attention_layers if index not in gone]
        unprotected = range(self.protect_first, len(model.layers) - self.protect_last)
        return [index for index in unprotected if index not in gone and attending != [index]]

    def first_of(self, model: ModelSpec, ranked: Iterable[int], count: int) -> list[int]:
        """The first ``count`` of the layers ``ranked`` that may go, one after the other."""
        gone: list[int] = []
        for index in ranked:
            if len(gone) < count and index in self.free(model, gone):
                gone.append(index)
        return gone

    def blocks(self, model: ModelSpec, count: int) -> list[list[int]]:
        """Every ``count`` neighbours of the layers that may go; softmax attention is left without them."""
        free, attending = self.free(model), {*model.attention_layers}
        every = [free[start : start + count] for start in range(len(free) - count + 1)]
        return [block for block in every if not attending <= {*block}]

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """The layers that are left; in a dry run the last ones go. ``choices``: DepthLayer."""
        if facts is not None:
            return depth_plan(model, {index: fact for index, fact in enumerate(facts) if fact is not None})
        last = self.first_of(model, self.free(model)[::-1], self.removed_of(model))
        return depth_plan(model, {index: {} for index in last})

    def possible(self, model: ModelSpec) -> Iterable[Plan]:
        """Each layer that may go, alone."""
        return (depth_plan(model, {index: {}}) for index in self.free(model) if self.removed_of(model))

    def search(self, model: ModelSpec) -> DepthSearch:
        """The search for the layers."""
        return DepthSearch(self, model)

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: the search has seen all."""
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Merges other layers into one that stays."""
        from anymla.methods.mka.merge import merge

        choice: DepthLayer = layer.choice
        shares = choice.shares or ((layer.index, 1.0),)
        if shares != ((layer.index, 1.0),):
            merge(layer, shares)
        return Changed(spec=layer.old, result={"layer": layer.index, "shares": [list(each) for each in shares]})

    def told(self, plan: Plan) -> str:
        """Which layers went where, by their numbers in the model before, and what each round cost."""
        rows = [
            f"| {index} | {'' if choice.into is None else choice.into} | {_number(choice.weight)} "
            f"| {_number(choice.similarity)} | {_number(choice.kl)} |"
            for index, choice in enumerate(plan.choices)
            if index in plan.removed
        ]
        if not rows:
            return "No layer was removed."
        head = "| layer removed | merged into | the other's weight | similarity | KL then |"
        return "\n".join([head, "|---:|---:|---:|---:|---:|", *rows])


def _plain(model: ModelSpec) -> bool:
    from anymla.architectures.families import FAMILIES

    return FAMILIES[model.text_model_type].plain_block


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

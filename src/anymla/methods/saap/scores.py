"""How much the loss needs each structure of a layer.

Shapes: n structures of a kind. g_w is the gradient of window w's loss with respect to a tensor W, g their mean, F the
mean of g_w^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.distributed import all_sum, all_sum_number
from anymla.methods.base import Facts, Survey, Unheard
from anymla.methods.saap.structures import Member, members
from anymla.model_run.stream import LayerBatch

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class MagnitudeSurvey(Survey):
    """The facts "KIND.magnitude" [n]: sums of squared weights."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = kinds

    def observer(self, layer: Layer) -> Any:
        """Nothing: the weights say it all."""
        return Unheard()

    def layer(self, layer: Layer, observed: Any) -> dict[str, Any]:
        """The facts of the layer."""
        return {
            f"{kind}.magnitude": total(owned, {name: weight.double().square() for name, weight in held.items()})
            for kind in self.kinds
            if (owned := members(kind, layer)) and (held := _scored(layer, owned))
        }


class TaylorSurvey(MagnitudeSurvey):
    """The facts "KIND.vector" and "KIND.element" [n]: what the loss would change by, to first and to second order."""

    backward = True

    def observer(self, layer: Layer) -> Gradients:
        """Sums of gradients and of their squares."""
        owned = {kind: members(kind, layer) for kind in self.kinds}
        return Gradients(layer, {kind: found for kind, found in owned.items() if found})

    def layer(self, layer: Layer, observed: Gradients) -> dict[str, Any]:
        """The facts of the layer, over all processes."""
        return observed.scores()


class Gradients:
    """Sums of the gradients of single windows, and of their squares, of every tensor that some structure owns."""

    def __init__(self, layer: Layer, owned: dict[str, tuple[Member, ...]]) -> None:
        self.owned, self.windows = owned, 0
        self.weights = {name: weight for found in owned.values() for name, weight in _scored(layer, found).items()}
        self.sums, self.squares = (
            {name: torch.zeros_like(weight) for name, weight in self.weights.items()} for _ in range(2)
        )

    def add(self, batch: LayerBatch) -> None:
        """Takes one window."""
        self.windows += 1
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.sums[name] += weight.grad
                self.squares[name].addcmul_(weight.grad, weight.grad)

    def scores(self) -> dict[str, Any]:
        """Vector-wise |sum_k g_k w_k| and element-wise sum_k |g_k w_k - w_k F_k w_k / 2| of all structures."""
        windows = all_sum_number(self.windows)
        first, second = dict[str, Tensor](), dict[str, Tensor]()
        for name, weight in self.weights.items():
            gradient, squares = (all_sum(sums[name].double()) / windows for sums in (self.sums, self.squares))
            first[name] = gradient * weight.detach().double()
            second[name] = (first[name] - weight.detach().double().square() * squares / 2).abs()
        return {
            f"{kind}.{name}": total(owned, numbers)
            for kind, owned in self.owned.items()
            for name, numbers in (("vector", first), ("element", second))
        }


def total(owned: Sequence[Member], numbers: dict[str, Tensor]) -> Tensor:
    """Of each structure [n], the sum over its vectors of the absolute sum of ``numbers`` over the vector."""
    return torch.stack([each.sums(numbers[each.name]).abs().sum(1) for each in owned if each.scored]).sum(0)


def fused(facts: Facts, kind: str, importance: str) -> list[Tensor | None]:
    """Importance [n] of the structures of ``kind`` in every layer; None in one that was not looked at.

    Two scores that are seen as Gaussian outputs with noise s_1 and s_2 are fused to I_v / (2 s_1^2) + I_e / (2 s_2^2) +
    log(s_1 s_2). The least sum over all structures has s_1^2 = mean(I_v) and s_2^2 = mean(I_e), which leaves the order
    of I_v / mean(I_v) + I_e / mean(I_e). Means are over the structures of this kind in all layers.
    """
    parts = ("vector", "element") if importance == "fused" else (importance,)
    read = [
        [fact[f"{kind}.{part}"].read() for part in parts] if fact and f"{kind}.{parts[0]}" in fact else None
        for fact in facts
    ]
    known = [scores for scores in read if scores is not None]
    means = [torch.cat(scores).mean().clamp_min(1e-300) for scores in zip(*known, strict=True)]
    return [
        None
        if scores is None
        else torch.stack([score / mean for score, mean in zip(scores, means, strict=True)]).sum(0)
        for scores in read
    ]


def _scored(layer: Layer, owned: Sequence[Member]) -> dict[str, Tensor]:
    return {each.name: layer.module.get_parameter(each.name) for each in owned if each.scored}

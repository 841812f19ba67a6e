"""Which layers go, and into which they are merged: one round after the other, each told by the KL of the model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from anymla.errors import TextError
from anymla.methods.base import Chosen, Facts, Look, Plan, Search
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.methods.mka.settings import MKA

WEIGHTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the layer that stays, as `search` tries them; 1 drops the other
CODE_WEIGHT = 0.62  # sigmoid(s / (s + s')) of two row sums of similarities that are nearly the same
LEAST_WINDOWS = 8  # that say anything of similarities


class DepthLayer(BaseModel):
    """What becomes of a layer: it is removed, alone or ``into`` another one, or is a sum of layers by ``shares``.

    ``kl``: nats per token that the model lost with this and what was chosen before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shares: tuple[tuple[int, float], ...] | None = None
    into: int | None = None
    similarity: float | None = None
    weight: float | None = None
    kl: float | None = None


def depth_plan(model: ModelSpec, chosen: Chosen) -> Plan:
    """The plan with the layers in ``chosen``: each is removed, or has shares."""
    choices = {index: DepthLayer(**fact) for index, fact in chosen.items()}
    removed = frozenset(index for index, choice in choices.items() if choice.shares is None)
    layers = tuple(layer for index, layer in enumerate(model.layers) if index not in removed)
    told = tuple(map(choices.get, range(len(model.layers))))
    return Plan(after=replace(model, layers=layers), choices=told, removed=removed)


class DepthSearch(Search):
    """Removes layers until as many are gone as the settings ask for."""

    def __init__(self, method: MKA, model: ModelSpec) -> None:
        self.method, self.model = method, model
        self.wanted = method.removed_of(model)
        self.count = self.wanted if method.strategy in ("kl", "merge") else min(1, self.wanted)

    def candidates(self, chosen: Chosen, look: Look) -> list[Chosen]:
        """What may go next."""
        gone = {index for index, fact in chosen.items() if "shares" not in fact}
        left = self.method.free(self.model, gone)
        if (missing := self.wanted - len(gone)) <= 0:
            return []
        match self.method.strategy:
            case "kl":
                return [{index: {}} for index in left]
            case "last":
                return [_dropped(self.method.first_of(self.model, left[::-1], missing))]
            case "influence":
                return [_dropped(self.method.first_of(self.model, least_influence(look, left), missing))]
            case "angular":
                return [_dropped(least_angle(look, self.method.blocks(self.model, missing)))]
        return self._merges(chosen, left, look)

    def plan(self, chosen: Chosen) -> Plan:
        """What the model is then."""
        return depth_plan(self.model, chosen)

    def _merges(self, chosen: Chosen, left: list[int], look: Look) -> list[Chosen]:
        """The most similar pair of neighbours, merged by every weight that is to be tried."""
        from anymla.methods.mka.states import LayerStates

        alike = similarities(look(LayerStates()), alike_pairs(self.model, left), self.method.kernel)
        pair = max(alike, key=lambda each: alike[each])
        told = {"similarity": alike[pair]}
        if self.method.weight == "delta":
            return [merged(chosen, pair, None, told)]
        weights = {"similarity": (min(1.0, max(0.5, alike[pair])),), "code": (CODE_WEIGHT,), "drop": (1.0,)}
        tried = [merged(chosen, pair, weight, told) for weight in weights.get(self.method.weight, WEIGHTS)]
        return tried if self.method.weight != "search" else [*tried, all_dropped(chosen | tried[-1])]


def alike_pairs(model: ModelSpec, left: list[int]) -> list[tuple[int, int]]:
    """Neighbours of one kind among the layers that are ``left``."""
    return [(first, second) for first, second in pairwise(left) if model.layers[first] == model.layers[second]]


def similarities(facts: Facts, pairs: list[tuple[int, int]], kernel: str) -> dict[tuple[int, int], float]:
    """NPIB of each pair of layers.

    Raises:
        TextError: there are too few windows.
    """
    from anymla.methods.mka.similarity import similarity

    states: dict[int, Any] = {index: _states(facts, index, "after") for pair in pairs for index in pair}
    if (windows := min(map(len, states.values()))) < LEAST_WINDOWS:
        raise TextError(
            f"{windows} calibration windows say nothing of similarities, {LEAST_WINDOWS} are needed: give more "
            "calibration_tokens or a smaller calibration_length"
        )
    return {pair: similarity(states[pair[0]], states[pair[1]], kernel) for pair in pairs}


def least_influence(look: Look, left: list[int]) -> list[int]:
    """The layers by their block influence, the least first."""
    from anymla.methods.mka.states import LayerStates

    facts = look(LayerStates())
    return sorted(left, key=lambda index: (facts[index] or {})["influence"])


def least_angle(look: Look, blocks: list[list[int]]) -> list[int]:
    """The block of layers that turns the last tokens' states the least."""
    from anymla.methods.mka.states import LayerStates, angle

    facts = look(LayerStates())
    return min(blocks, key=lambda each: angle(_states(facts, each[0], "before"), _states(facts, each[-1], "after")))


def merged(chosen: Chosen, pair: tuple[int, int], weight: float | None, told: dict[str, Any]) -> Chosen:
    """What is said of a pair whose second layer is merged into the first, which has ``weight``; None: by differences.

    By differences every layer of a group adds what it differs from the first: of two, the second one remains.
    """
    first, second = (dict(chosen.get(index, {}).get("shares", [(index, 1.0)])) for index in pair)
    if weight is None:
        shares = {**dict.fromkeys({**first, **second}, 1.0), pair[0]: 2.0 - len({**first, **second})}
    else:
        shares = {index: weight * first.get(index, 0) + (1 - weight) * second.get(index, 0) for index in first | second}
        shares = {index: share for index, share in shares.items() if share}
    removed = {pair[1]: {"into": pair[0], "weight": weight, **told}}
    return removed if weight == 1 else removed | {pair[0]: {"shares": [*shares.items()]}}


def all_dropped(chosen: Chosen) -> Chosen:
    """The same layers removed, and nothing of them kept."""
    return {
        index: {"shares": [(index, 1.0)]} if "shares" in fact else fact | {"weight": 1.0}
        for index, fact in chosen.items()
    }


def _dropped(layers: list[int]) -> Chosen:
    return {index: {} for index in layers}


def _states(facts: Facts, index: int, name: str) -> Any:
    if (fact := facts[index]) is None:
        raise ValueError(f"layer {index} is not there any more")
    return fact[name]

"""How many structures each layer keeps, where all layers together keep a given number.

Shapes: n structures of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 0.25  # share of its structures that a layer keeps at least
Worths = Sequence[Sequence[float]]  # of each layer: what its structures [n] are worth, the most first


def allocated(worths: Worths, least: Sequence[int], budget: int, step: int) -> list[int]:
    """How many structures each layer keeps: ``least`` of its own, then the blocks of ``step`` that are worth most.

    The sum is ``budget``, or less than ``step`` below it.
    """
    blocks = [
        (-sum(worth[start : start + step]), start, layer)
        for layer, worth in enumerate(worths)
        for start in range(least[layer], len(worth) - step + 1, step)
    ]
    kept = [*least]
    for _, _, layer in sorted(blocks)[: max(0, budget - sum(least)) // step]:
        kept[layer] += step
    return kept


def floor_of(whole: int, step: int, least: int = 1) -> int:
    """The fewest structures that a layer keeps, a multiple of ``step``: a quarter, and ``least``."""
    return step * ceil(max(LEAST * whole, least) / step)


def even(wholes: Sequence[int]) -> Worths:
    """Worths with which every layer keeps nearly the same share."""
    return [[-(place + 1) / whole for place in range(whole)] for whole in wholes]


def of_scores(scores: Sequence[Tensor], *, standardised: bool) -> Worths:
    """Worths by importance [n]; ``standardised``: in standard deviations from the mean of the layer."""
    found = []
    for score in scores:
        if standardised:
            score = (score - score.mean()) / score.std(correction=0).clamp_min(1e-300)
        found.append(score.sort(descending=True).values.tolist())
    return found

"""How one budget of numbers is spread over layers: by depth, by condition numbers, by energies. Loads no torch.

L layers; a layer has room for ``least`` to ``most`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

HALVINGS = 60  # of the interval in which a budget is looked for


@dataclass(frozen=True)
class Room:
    """The fewest and the most numbers that a layer can have."""

    least: int
    most: int


def by_depth(layers: int) -> list[float]:
    """How far each layer is from the first one: 0 there, 1 in the last."""
    return [index / max(1, layers - 1) for index in range(layers)]


def by_condition(logarithms: Sequence[float]) -> list[float]:
    """LoRC's cumulative condition numbers as falls: 0 in the first layer, 1 in the last.

    With K_l the product of all condition numbers from layer l on, (max log K - log K_l) / (max log K - min log K).

    Args:
        logarithms: of each layer's condition numbers, summed over its keys and values; none is below 0.
    """
    cumulative = [*accumulate(reversed(logarithms))][::-1]
    span = cumulative[0] - cumulative[-1]
    return [(cumulative[0] - each) / span for each in cumulative] if span > 0 else by_depth(len(cumulative))


def falling(falls: Sequence[float], rooms: Sequence[Room], budget: float, step: int = 1) -> list[int]:
    """Numbers that fall from r_max where ``falls`` is 0 to r_min where it is 1 (LoRC, arXiv 2410.03111).

    r = r_max (1 - fall (1 - r_min / r_max)). First r_max is all that a layer has and r_min gives way, then r_max.
    """

    def shape(size: float) -> list[float]:
        high, low = min(1.0, 2 * size), max(0.0, 2 * size - 1)
        shares = [high - fall * (high - low) for fall in falls]
        return [room.least + (room.most - room.least) * share for share, room in zip(shares, rooms, strict=True)]

    return _whole(_at_budget(shape, budget), rooms, budget, step)


def proportional(weights: Sequence[float], rooms: Sequence[Room], budget: float) -> list[int]:
    """Numbers in proportion to ``weights``, as far as each layer has room (Palu, arXiv 2407.21118, rank search)."""
    floor = max(weights) * 1e-9 or 1.0
    top = max(room.most / max(weight, floor) for weight, room in zip(weights, rooms, strict=True))

    def shape(size: float) -> list[float]:
        pairs = zip(weights, rooms, strict=True)
        return [min(room.most, max(room.least, size * top * max(weight, floor))) for weight, room in pairs]

    return _whole(_at_budget(shape, budget), rooms, budget, 1)


def greedy(energies: Sequence[Sequence[float]], rooms: Sequence[Room], budget: float) -> list[int]:
    """As many numbers as keep the largest energies of all layers; beyond ``least`` of each, which it has anyway.

    Args:
        energies: of a layer what each number beyond its least keeps, by falling energy; later numbers keep nothing.
        rooms: of each layer.
        budget: numbers of all layers.
    """
    numbers = [room.least for room in rooms]
    offered = sorted(
        (-energy, index)
        for index, (each, room) in enumerate(zip(energies, rooms, strict=True))
        for energy in list(each)[: room.most - room.least]
    )
    for _, index in offered[: max(0, int(budget) - sum(numbers))]:
        numbers[index] += 1
    return numbers


def _at_budget(shape: Callable[[float], list[float]], budget: float) -> list[float]:
    """What ``shape`` gives at the size, from 0 to 1, at which its sum is the budget; the sum rises with the size."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shape(middle)) <= budget else (low, middle)
    return shape(high) if sum(shape(high)) <= budget + 1e-6 else shape(low)


def _whole(numbers: Sequence[float], rooms: Sequence[Room], budget: float, step: int) -> list[int]:
    """Multiples of ``step``, or all that there is room for; what is left goes to the largest remainders."""
    found = [
        room.most if number >= room.most - 1e-6 else max(room.least, int((number + 1e-6) // step) * step)
        for number, room in zip(numbers, rooms, strict=True)
    ]
    by_remainder = sorted(range(len(found)), key=lambda index: found[index] - numbers[index])
    for index in by_remainder:
        more = min(step, rooms[index].most - found[index])
        if sum(found) + more <= budget + 1e-6:
            found[index] += more
    return found

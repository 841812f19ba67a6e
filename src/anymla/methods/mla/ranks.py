"""How the step spreads its budget over layers, by the setting `ranks`. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anymla.methods.ranks import Room, by_condition, by_depth, falling, greedy, proportional

SURVEYED = ("lorc", "energy", "fisher")  # what a survey decides
RANKS = ("uniform", "linear", *SURVEYED)


def spread(
    ranks: str, rooms: Sequence[Room], even: Sequence[int], typical: Sequence[int], facts: Sequence[Any] | None
) -> list[int]:
    """Cached numbers of every layer, as many in all as ``even`` has.

    Args:
        ranks: of ``RANKS``, and not uniform.
        rooms: the fewest and the most numbers of each layer.
        even: numbers that a uniform budget gives each layer.
        typical: rope dims among these.
        facts: of each layer what the survey says (rank_survey.py); None in a dry run, which takes lorc for linear and
            the others for uniform.
    """
    budget = sum(even)
    if ranks == "linear" or (ranks == "lorc" and facts is None):
        return falling(by_depth(len(rooms)), rooms, budget)
    if facts is None:
        return [*even]
    if ranks == "lorc":
        return falling(by_condition([sum(fact["condition"]) for fact in facts]), rooms, budget)
    if ranks == "fisher":
        return proportional([fact["fisher"] for fact in facts], rooms, budget)
    beside = [Room(max(room.least, dims + 1), room.most) for room, dims in zip(rooms, typical, strict=True)]
    energies = [fact["energies"][room.least - dims :] for fact, room, dims in zip(facts, beside, typical, strict=True)]
    return greedy(energies, beside, budget)

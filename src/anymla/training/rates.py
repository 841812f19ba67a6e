"""The learning rate, found by short trials from the same start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from anymla.training.stages import TRIAL, Stage

WIDTH_RATE = 0.2  # rates fall with the hidden size
FACTOR = 2  # between two rates
LOWEST, HIGHEST = -10, 3  # powers of the factor
SHARE, FEWEST = 0.02, 24  # a trial's steps: a share of the run's, and at least so many
TOKENS, MOST = 65_536, 0.1  # of fewer tokens too low a rate looks best; but no larger share for them


def rate_of(power: int, hidden: int) -> float:
    """The rate of a trial, for a model of ``hidden`` numbers, in three digits."""
    return float(f"{WIDTH_RATE / hidden * FACTOR**power:.3g}")


def first_power(kl: float) -> int:
    """Which power to try first, by the KL [nats] at the start: the nearer the original, the lower the best rate."""
    return max(LOWEST, min(0, round(math.log(max(kl, 1e-12), FACTOR))))


def next_power(scores: Mapping[int, float]) -> int | None:
    """Which power to try next, by the scores of those that were tried; None if the best has worse ones on both sides.

    A score has one minimum over the rate: too low a rate learns little, too high a one does harm.
    """
    best = best_power(scores)
    return next((power for power in (best - 1, best + 1) if power not in scores and LOWEST <= power <= HIGHEST), None)


def best_power(scores: Mapping[int, float]) -> int:
    """The one with the lowest score."""
    return min(scores, key=lambda power: (scores[power], power))


def trial_of(stage: Stage) -> Stage:
    """A short run like ``stage``."""
    enough = min(math.ceil(TOKENS / stage.step_tokens), round(MOST * stage.steps))
    return replace(stage, name=TRIAL, steps=min(stage.steps, max(FEWEST, round(SHARE * stage.steps), enough)))

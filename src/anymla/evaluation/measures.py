"""What a benchmark measures, and the same of the original beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any


def mean_error(outcomes: Sequence[float]) -> float | None:
    """The standard error of the mean of ``outcomes``; None for fewer than two."""
    return stdev(outcomes) / math.sqrt(len(outcomes)) if len(outcomes) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number about one model.

    ``outcomes`` are what each item gave, where ``value`` is their mean; by them two models are compared item by item.
    ``part_of`` names the measure that sums this one up. ``facts`` is what else there is to know: length, shots, ...
    """

    name: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    higher_is_better: bool | None = True
    part_of: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Sequence[float] = field(default=(), repr=False)

    @classmethod
    def mean(cls, name: str, metric: str, outcomes: Sequence[float], **rest: Any) -> Measure:
        """The mean of ``outcomes``, with its standard error."""
        value, error = fmean(outcomes), mean_error(outcomes)
        return cls(
            name=name, metric=metric, value=value, stderr=error, samples=len(outcomes), outcomes=outcomes, **rest
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measure of a model, and of the original where there is one."""

    model: Measure
    original: Measure | None

    @property
    def difference(self) -> float | None:
        """The model's value less the original's."""
        return None if self.original is None else self.model.value - self.original.value

    @property
    def difference_stderr(self) -> float | None:
        """The standard error of the difference, from the differences item by item: both were asked the same.

        None where the value is not a mean over items.
        """
        if self.original is None or len(self.model.outcomes) != len(self.original.outcomes):
            return None
        return mean_error([new - old for new, old in zip(self.model.outcomes, self.original.outcomes, strict=True)])

    @property
    def ratio(self) -> float | None:
        """The model's value over the original's; None where that is zero."""
        return None if self.original is None or self.original.value == 0 else self.model.value / self.original.value

    def to_dict(self) -> dict[str, Any]:
        """The comparison under its stable JSON names; what is no finite number is None."""
        numbers = {
            "difference": _finite(self.difference),
            "difference_stderr": _finite(self.difference_stderr),
            "ratio": _finite(self.ratio),
        }
        return {
            "name": self.model.name,
            "metric": self.model.metric,
            "part_of": self.model.part_of,
            "higher_is_better": self.model.higher_is_better,
            "samples": self.model.samples,
            **self.model.facts,
            "model": _value(self.model),
            "original": None if self.original is None else _value(self.original),
            **numbers,
        }


def compare(model: Sequence[Measure], original: Sequence[Measure] | None) -> tuple[Comparison, ...]:
    """Each measure of ``model`` beside the same one of ``original``."""
    others: Sequence[Measure | None] = [None] * len(model) if original is None else original
    return tuple(Comparison(model=one, original=other) for one, other in zip(model, others, strict=True))


def _value(measure: Measure) -> dict[str, float | None]:
    return {"value": _finite(measure.value), "stderr": _finite(measure.stderr)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

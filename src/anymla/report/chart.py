"""Charts of a page: numbers become places on a drawing, which the template draws as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

WIDTH, HEIGHT = 640, 340  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 88, 40, 20, 62
MOST_TICKS = 6
MARKS = ("circle", "square", "triangle", "diamond")
COLOURS = 6  # that the template has

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (x, y) under one name, joined by a line; ``marked``: whether each is drawn as well."""

    name: str
    points: tuple[Point, ...]
    marked: bool = True


@dataclass(frozen=True)
class Tick:
    """A number beside an axis: where, and as it is written."""

    place: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point on the drawing, its kind of mark, and what it says when it is pointed at."""

    x: float
    y: float
    kind: str
    says: str


@dataclass(frozen=True)
class Line:
    """A series on the drawing: its colour's number, the path of its line, its marks."""

    name: str
    colour: int
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series against two axes.

    ``level``: a value of y to compare with, and its name. ``log``: whether y is on a logarithmic scale; then all of y
    is above 0. ``from_zero``: whether the axis of x begins at 0 at the latest.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    log: bool = False
    from_zero: bool = False

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    @property
    def alt(self) -> str:
        """Returns what the chart shows, for readers who cannot see it: each series with its range, and the level."""
        said = [f"{self.y_label} against {self.x_label}."]
        for each in self.series:
            values = [y for _, y in each.points]
            said.append(f"{each.name}: {len(values)} points from {shown(min(values))} to {shown(max(values))}.")
        if self.level is not None:
            said.append(f"{self.level[0]}: {shown(self.level[1])}.")
        return " ".join(said)

    @cached_property
    def x_ticks(self) -> tuple[Tick, ...]:
        """Returns the ticks of the horizontal axis."""
        return tuple(Tick(self._x(value), shown(value)) for value in self._x_values)

    @cached_property
    def y_ticks(self) -> tuple[Tick, ...]:
        """Returns the ticks of the vertical axis."""
        return tuple(Tick(self._y(value), shown(value)) for value in self._y_values)

    @property
    def level_place(self) -> float | None:
        """Returns how far down the level is."""
        return None if self.level is None else self._y(self.level[1])

    @property
    def lines(self) -> tuple[Line, ...]:
        """The series on the drawing."""
        return tuple(self._line(number, each) for number, each in enumerate(self.series))

    def _line(self, number: int, series: Series) -> Line:
        places = [(self._x(x), self._y(y)) for x, y in series.points]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places) if len(places) > 1 else ""
        marks = [
            Mark(*place, MARKS[number % len(MARKS)], f"{series.name}: {shown(x)}, {shown(y)}")
            for place, (x, y) in zip(places, series.points, strict=True)
        ]
        return Line(series.name, number % COLOURS, path, tuple(marks) if series.marked else ())

    @cached_property
    def _x_values(self) -> list[float]:
        return _even(self._all_x, least=0.0 if self.from_zero else None)

    @cached_property
    def _y_values(self) -> list[float]:
        return _powers(self._all_y) if self.log else _even(self._all_y, least=0.0)

    @property
    def _all_x(self) -> list[float]:
        return [x for each in self.series for x, _ in each.points]

    @property
    def _all_y(self) -> list[float]:
        return [y for each in self.series for _, y in each.points] + ([] if self.level is None else [self.level[1]])

    def _x(self, value: float) -> float:
        return self.left + (self.right - self.left) * _share(value, self._all_x, self._x_values)

    def _y(self, value: float) -> float:
        if self.log:
            share = _share(math.log(value), _logs(self._all_y), _logs(self._y_values))
        else:
            share = _share(value, self._all_y, self._y_values)
        return self.bottom - (self.bottom - self.top) * share


def shown(value: float) -> str:
    """A number as axes have it: short, with thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _share(value: float, values: Sequence[float], ticks: Sequence[float]) -> float:
    """How far ``value`` is along an axis that holds all values and ticks, from 0 to 1."""
    low, high = min(*values, *ticks), max(*values, *ticks)
    return 0.5 if high == low else (value - low) / (high - low)


def _logs(values: Iterable[float]) -> list[float]:
    return [math.log(value) for value in values]


def _even(values: Sequence[float], least: float | None) -> list[float]:
    """Ticks at even steps of 1, 2 or 5 times a power of ten around ``values``, and around ``least``."""
    low, high = min(values), max(values)
    low = low if least is None else min(least, low)
    if high == low:
        return [low] if least is None else [low, low + 1]
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _powers(values: Sequence[float]) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten around ``values``; the powers alone where those are too many."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for times in ((1, 2, 5), (1, 3), (1,)):
        every = [time * 10.0**power for power in powers for time in times]
        below = max((tick for tick in every if tick <= low), default=every[0])
        above = min((tick for tick in every if tick >= high and tick > below), default=every[-1])
        kept = [tick for tick in every if below <= tick <= above]
        if len(kept) <= MOST_TICKS + 1:
            break
    return kept if len(kept) <= 2 * MOST_TICKS else kept[:: -(-len(kept) // MOST_TICKS)]

"""The picture of an evaluation: bars for benchmarks, heat maps for the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymla.evaluation.measures import Comparison, Measure

ORIGINAL, MODEL = "#b9c2be", "#0b6e4f"
MOST_BARS = 30


def evaluation_plot(path: Path, rows: Sequence[Comparison], grids: Mapping[str, Sequence[Comparison]]) -> None:
    """Draws to ``path`` the shares among ``rows`` as bars, and each grid of cells as a heat map per model.

    Nothing is drawn where there is neither.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = _shares(rows)
    heights = [*([0.9 + 0.42 * len(bars)] if bars else []), *(2.3 for _ in grids)]
    if not heights:
        return
    figure = pyplot.figure(figsize=(8, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if bars:
        _draw_bars(parts.pop(0).subplots(), bars)
    for part, (title, cells) in zip(parts, grids.items(), strict=True):
        _draw_grid(part, title, cells)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _shares(rows: Sequence[Comparison]) -> list[Comparison]:
    """What lies between 0 and 1; where that is too much for a picture, without the parts of a sum."""
    shares = [row for row in rows if row.model.higher_is_better and 0 <= row.model.value <= 1]
    return shares if len(shares) <= MOST_BARS else [row for row in shares if row.model.part_of is None][:MOST_BARS]


def _draw_bars(axes: Any, rows: Sequence[Comparison]) -> None:
    """Two bars per row, the original's above, with standard errors."""
    compared = rows[0].original is not None
    thickness = 0.38 if compared else 0.6
    for place, row in enumerate(rows):
        if row.original is not None:
            _draw_bar(
                axes, place - thickness / 2, row.original, ORIGINAL, thickness, "original" if place == 0 else None
            )
        shift = thickness / 2 if compared else 0
        _draw_bar(axes, place + shift, row.model, MODEL, thickness, "model" if place == 0 else None)
    axes.set_yticks(range(len(rows)), [f"{row.model.name}  ({row.model.metric})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("Benchmarks, with standard errors", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if compared:
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_bar(axes: Any, place: float, measure: Measure, color: str, thickness: float, label: str | None) -> None:
    error = measure.stderr or 0.0
    axes.barh(place, measure.value, thickness, color=color, label=label)
    axes.errorbar(measure.value, place, xerr=error, color="#333333", linewidth=1, capsize=2)
    end = min(measure.value + error, 0.93)
    axes.text(end + 0.01, place, f"{measure.value:.3f}", va="center", fontsize=8, color="#333333")


def _draw_grid(part: Any, title: str, cells: Sequence[Comparison]) -> None:
    """Lengths down, depths across; one scale of colours for both models."""
    lengths = list(dict.fromkeys(cell.model.facts["length"] for cell in cells))
    depths = list(dict.fromkeys(cell.model.facts["depth"] for cell in cells))
    maps = {"model": [cell.model.value for cell in cells]}
    if all(cell.original is not None for cell in cells):
        maps = {"original": [cell.original.value for cell in cells if cell.original is not None]} | maps
    values = [value for each in maps.values() for value in each]
    low, high = (min(0, *values), max(values)) if cells[0].model.metric.startswith("gain") else (0, 1)
    part.suptitle(title, x=0.01, ha="left")
    for axes, (name, values) in zip(part.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        table = [values[start : start + len(depths)] for start in range(0, len(values), len(depths))]
        image = axes.imshow(table, vmin=low, vmax=high, cmap="YlGn", aspect="auto")
        for row, numbers in enumerate(table):
            for column, value in enumerate(numbers):
                dark = value > low + 0.6 * (high - low)
                color = "white" if dark else "#222222"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_xlabel("depth (1: just before the question)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=list(part.axes), shrink=0.9)
    part.axes[0].set_ylabel("tokens")

"""What `anymla eval` shows on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anymla.report.tables import scores_table
from anymla.report.terminal import table
from anymla.report.units import text_read

if TYPE_CHECKING:
    from anymla.evaluation.benchmarks import Evaluation
    from anymla.evaluation.measures import Comparison, Measure
    from anymla.report.terminal import FittedTable

TITLES = {"tasks": "lm-eval tasks", "blimp": "BLiMP", "lambada": "LAMBADA"}
SHOWN = {("copy", "probability"), ("recall", "gain (nats per token)"), ("needle", "probability")}  # the most sensitive


def probe_grids(rows: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """The probe's cells, by length and depth, of one metric per kind; under a title."""
    titles = {
        (row.model.name, row.model.metric): _grid_title(row)
        for row in rows
        if row.model.part_of is None and (row.model.name, row.model.metric) in SHOWN
    }
    return {
        title: [row for row in rows if row.model.part_of is not None and (row.model.name, row.model.metric) == which]
        for which, title in titles.items()
    }


def _grid_title(whole: Comparison) -> str:
    """What is shown, and whether the original can do it at all."""
    able, chance = whole.original or whole.model, whole.model.facts["chance"]
    note = " (not above it)" if able.value < 2 * chance or able.value <= 0 else ""
    return f"{able.name}: {able.metric}, chance {chance:.2g}{note}"


def evaluation_tables(evaluation: Evaluation) -> list[FittedTable]:
    """A table per kind of what was measured."""
    settings, tables = evaluation.settings, []
    if evaluation.scores is not None:
        scored = {} if evaluation.original is None else {"original": evaluation.original}
        read = text_read(str(settings["text"]), evaluation.scores.tokens, settings["length"])
        tables.append(scores_table(scored | {settings["model"]: evaluation.scores}, f"On {read}"))
    tables += [
        _comparison_table(title, evaluation.benchmarks[kind])
        for kind, title in TITLES.items()
        if kind in evaluation.benchmarks
    ]
    grids = probe_grids(evaluation.benchmarks.get("probe", ()))
    return [*tables, *(_grid_table(title, cells) for title, cells in grids.items())]


def _comparison_table(title: str, rows: Sequence[Comparison]) -> FittedTable:
    """Values with their standard errors; that of the difference is by item, which is smaller: both had the same."""
    columns, lines = ["name", "metric"], [[row.model.name, row.model.metric] for row in rows]
    if len({metric for _, metric in lines}) == 1:
        title, columns, lines = f"{title}, {lines[0][1]}", ["name"], [[name] for name, _ in lines]
    if rows[0].original is None:
        columns += ["value", "items"]
        lines = [[*line, _value(row.model), _count(row)] for line, row in zip(lines, rows, strict=True)]
    else:
        columns += ["original", "model", "difference", "items"]
        lines = [
            [*line, _value(row.original), _value(row.model), _difference(row), _count(row)]
            for line, row in zip(lines, rows, strict=True)
        ]
    return table(title, columns, lines)


def _value(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    return _number(measure.value) + ("" if measure.stderr is None else f" ± {_number(measure.stderr)}")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _difference(row: Comparison) -> str:
    error = "" if row.difference_stderr is None else f" ± {_number(row.difference_stderr)}"
    return f"{row.difference:+.3f}{error}"


def _count(row: Comparison) -> str:
    return "-" if row.model.samples is None else f"{row.model.samples:,}"


def _grid_table(title: str, cells: Sequence[Comparison]) -> FittedTable:
    """Lengths by depths: the model's value, or original -> model and their ratio."""
    depths = list(dict.fromkeys(cell.model.facts["depth"] for cell in cells))
    lines = [
        (cells[start].model.facts["length"], *(_cell(cell) for cell in cells[start : start + len(depths)]))
        for start in range(0, len(cells), len(depths))
    ]
    compared = "\noriginal→model, and their ratio" if cells[0].original is not None else ""
    return table(f"Probe, {title}{compared}", ("length", *(f"depth {depth:g}" for depth in depths)), lines)


def _cell(cell: Comparison) -> str:
    """A ratio only where the original is above chance by more than two standard errors."""
    old, new = cell.original, cell.model
    if old is None:
        return f"{new.value:.2f}"
    surely = cell.ratio is not None and old.value - old.facts["chance"] > 2 * (old.stderr or 0)
    return f"{old.value:.2f}→{new.value:.2f}" + (f"\nx{cell.ratio:.2f}" if surely else "\n-")

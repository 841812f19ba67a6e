"""The page of an evaluation: scores on a text, benchmarks as dots on a line, the probe as shaded cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anymla.cards import public_name
from anymla.report.conversion import scores_cells
from anymla.report.costs import quality_tiles
from anymla.report.evaluation import TITLES, probe_grids
from anymla.report.page import Cell, Command, Dots, Page, Section, Table, Tile, number, record
from anymla.report.results import RESULTS
from anymla.report.units import size, text_read

if TYPE_CHECKING:
    from anymla.evaluation.benchmarks import Evaluation
    from anymla.evaluation.measures import Comparison, Measure
    from anymla.evaluation.scores import Scores


def evaluation_page(evaluation: Evaluation, content: Mapping[str, Any]) -> Page:
    """The page of an evaluation; ``content``: what results.json holds."""
    settings, scores = evaluation.settings, evaluation.scores
    model, against = str(settings["model"]), settings["against"]
    compared = "" if against is None else f" beside {public_name(against)}"
    scored = {name: each for name, each in (("original", evaluation.original), (model, scores)) if each is not None}
    grids = probe_grids(evaluation.benchmarks.get("probe", ()))
    return Page(
        title=f"{public_name(model)}{compared}",
        lead=f"Measured by anymla {evaluation.versions['anymla']} in {settings['dtype']} on {settings['device']}.",
        tiles=() if scores is None else _tiles(scores, evaluation.original),
        sections=(
            *([] if scores is None else [_text_section(scored, settings)]),
            *(
                Section(heading=title, text=_how_to_read(rows), tables=(_comparisons(rows),))
                for kind, title in TITLES.items()
                if (rows := evaluation.benchmarks.get(kind))
            ),
            Section(
                heading="What the model finds again in its context",
                text="Depth 1 is just before the question. The darker a cell, the higher its value." if grids else "",
                tables=tuple(table for title, cells in grids.items() for table in _grid_tables(title, cells)),
            ),
            Section(heading="The command", commands=(Command("Measures it again", content["command"]),)),
            record(RESULTS, content),
        ),
    )


def _tiles(scores: Scores, original: Scores | None) -> tuple[Tile, ...]:
    once = (
        f"and {size(scores.cache_window_bytes)} once" if scores.cache_window_bytes else "measured from the live cache"
    )
    quality = quality_tiles(scores, None if original is None else original.perplexity)
    return (Tile("Cache per token", size(scores.cache_bytes_per_token), once), *quality)


def _text_section(scored: Mapping[str, Scores], settings: Mapping[str, Any]) -> Section:
    columns = (
        *("model", "perplexity", "KL (nats per token)", "same top token"),
        *("cache per token", "+ once", "numbers per token and layer"),
    )
    table = Table(columns=columns, rows=tuple(tuple(_scored(name, scores)) for name, scores in scored.items()))
    tokens = next(iter(scored.values())).tokens
    read = text_read(public_name(str(settings["text"])), tokens, settings["length"])
    return Section(heading=f"On {read}", tables=(table,))


def _scored(name: str, scores: Scores) -> Iterator[Cell]:
    """A model's row: quality, then its cache."""
    yield Cell(public_name(name))
    yield from scores_cells(scores)
    for each in (scores.cache_bytes_per_token, scores.cache_window_bytes):
        yield number(size(each), each)
    numbers = scores.cache_numbers_per_token_per_layer
    yield number(f"{numbers:g}", numbers)


def _how_to_read(rows: Sequence[Comparison]) -> str:
    if rows[0].original is None:
        return "± is a standard error."
    return "± is a standard error; that of the difference is by item. The ring is the original, the dot is the model."


def _comparisons(rows: Sequence[Comparison]) -> Table:
    compared = rows[0].original is not None
    columns = ("name", "metric", *(("original",) if compared else ()), "model")
    columns += ("difference", "items") if compared else ("items",)
    return Table(columns=columns, rows=tuple(tuple(_comparison(row)) for row in rows))


def _comparison(row: Comparison) -> Iterator[Cell]:
    yield Cell(row.model.name)
    yield Cell(row.model.metric)
    if row.original is not None:
        yield _measure(row.original)
    yield _measure(row.model, _dots(row))
    if row.difference is not None:
        yield number(f"{row.difference:+.3f}{_error(row.difference_stderr)}", row.difference)
    yield number("-" if row.model.samples is None else f"{row.model.samples:,}", row.model.samples)


def _measure(measure: Measure, dots: Dots | None = None) -> Cell:
    short = f"{measure.value:.3f}" if abs(measure.value) < 100 else f"{measure.value:.4g}"
    return number(f"{short}{_error(measure.stderr)}", measure.value, dots=dots)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.3f}"


def _dots(row: Comparison) -> Dots | None:
    """Of shares only, which lie between 0 and 1."""
    original = None if row.original is None else row.original.value
    if not row.model.higher_is_better or not all(0 <= each <= 1 for each in (row.model.value, original or 0)):
        return None
    return Dots(model=row.model.value, error=row.model.stderr or 0.0, original=original)


def _grid_tables(title: str, cells: Sequence[Comparison]) -> Iterator[Table]:
    """Lengths down, depths across; one scale of shades for both models."""
    lengths = list(dict.fromkeys(cell.model.facts["length"] for cell in cells))
    depths = list(dict.fromkeys(cell.model.facts["depth"] for cell in cells))
    maps = {"model": [cell.model.value for cell in cells]}
    if all(cell.original is not None for cell in cells):
        maps = {"original": [cell.original.value for cell in cells if cell.original is not None]} | maps
    every = [value for values in maps.values() for value in values]
    low, high = min(0, *every), max(1e-9, *every)
    columns = ("tokens", *(f"depth {depth:g}" for depth in depths))
    for name, values in maps.items():
        shaded = [number(f"{value:.2f}", value, shade=0.6 * (value - low) / (high - low)) for value in values]
        starts = range(0, len(shaded), len(depths))
        rows = [
            (number(str(length), length), *shaded[start : start + len(depths)])
            for length, start in zip(lengths, starts, strict=True)
        ]
        yield Table(columns=columns, rows=tuple(rows), caption=f"{title}; {name}")

"""The page of a tuning, with its course."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.report.chart import Chart, Series
from anymla.report.costs import layers_section, papers_section, use_section
from anymla.report.page import Cell, Page, Section, Table, Tile, number, record
from anymla.report.units import duration

if TYPE_CHECKING:
    from anymla.training.outcome import Recovery

MOST_POINTS = 400  # of a curve: more than the drawing can show

Lines = Sequence[Mapping[str, Any]]


def tuning_page(report: Recovery, folder: Path, teacher: str, lines: Lines) -> Page:
    """The page of a tuning; ``folder`` holds the weights and their account, ``lines`` are those of metrics.jsonl."""
    before, after = report.before, report.after
    return Page(
        title=f"{report.output.name} after tuning",
        lead=(
            f"Made by anymla {report.anymla_version} in {report.steps:,} steps over {report.tokens:,} tokens. Scores "
            "are on held-out text; KL is to the original."
        ),
        tiles=(
            Tile("KL to the original", f"{after.kl:.3g}", f"before: {before.kl:.3g}"),
            Tile("Perplexity", f"{after.perplexity:.4g}", f"before: {before.perplexity:.4g}"),
            Tile("Gap closed", f"{report.gap_closed:.1%}", "in log-perplexity, to the original"),
            Tile("Time", duration(report.seconds)),
        ),
        sections=(
            Section(heading="Before and after", tables=(_scores_table(report),), charts=tuple(_curves(lines))),
            layers_section(folder),
            use_section(folder, report.output, teacher),
            papers_section([report.tuning]),
            record("tuning.json", report.to_dict()),
        ),
    )


def _scores_table(report: Recovery) -> Table:
    rows = [(Cell("original"), _number(report.original_perplexity), _number(0.0))]
    for name, scores in (("before", report.before), ("after", report.after)):
        rows.append((Cell(name), _number(scores.perplexity), _number(scores.kl)))
    return Table(columns=("model", "perplexity", "KL (nats per token)"), rows=tuple(rows))


def _number(value: float) -> Cell:
    return number(f"{value:.4f}", value)


def _curves(lines: Lines) -> Iterator[Chart]:
    """The loss of every step, and what the held-out text says, against tokens."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    losses = [
        _series(stage, [line for line in lines if line["stage"] == stage], "loss", marked=False) for stage in stages
    ]
    yield from _against_tokens("Loss", "loss (log scale)", losses, log=True)
    scored = [line for line in lines if "eval_kl" in line]
    level = ("original", float(scored[-1]["original_perplexity"]))
    tuned = [_series("tuned", scored, "eval_perplexity")]
    yield from _against_tokens("Perplexity of held-out text", "perplexity (log scale)", tuned, log=True, level=level)
    kl = [_series("tuned", scored, "eval_kl")]
    yield from _against_tokens("KL on held-out text", "KL (nats per token)", kl)


def _series(name: str, lines: Lines, value: str, *, marked: bool = True) -> Series:
    points = [(float(line["tokens"]), float(line[value])) for line in lines if value in line]
    step = max(1, -(-len(points) // MOST_POINTS))
    return Series(name=name, points=tuple(points[::step]), marked=marked)


def _against_tokens(
    title: str, label: str, series: Sequence[Series], *, log: bool = False, level: tuple[str, float] | None = None
) -> Iterator[Chart]:
    """The chart, where there is something to draw: nothing below 0, and on a logarithmic scale no 0 either."""
    above = [
        replace(each, points=tuple(at for at in each.points if at[1] > 0 or (at[1] == 0 and not log)))
        for each in series
    ]
    if drawn := tuple(each for each in above if each.points):
        yield Chart(title=title, x_label="tokens learned from", y_label=label, series=drawn, log=log, level=level)

"""What `anymla demo` shows, on the terminal and as a page."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from anymla.report.chart import Chart, Series
from anymla.report.page import PAGE, Cell, Command, Page, Section, Table, record
from anymla.report.results import RESULTS
from anymla.report.terminal import table
from anymla.report.units import size

if TYPE_CHECKING:
    from anymla.demo import Contender, DemoOutcome
    from anymla.evaluation.scores import Scores

COLUMNS = ("method", "bytes/token", "kept", "+ once", "perplexity", "KL", "same top token")


def demo_shown(outcome: DemoOutcome) -> Group:
    """The table, and what both models answer, for the terminal."""
    said = [
        Text.assemble("\n" if who == "asked" else "", (f"{who}: ", "bold"), text)
        for answer in outcome.answers
        for who, text in zip(
            ("asked", "original", outcome.converted), (answer.prompt, answer.original, answer.converted), strict=True
        )
    ]
    wrote = f"Wrote {outcome.output / PAGE} and {outcome.output / 'model'} in {outcome.seconds:.0f} s."
    ahead = f"Next: anymla chat {quote(str(outcome.output / 'model'))}. On your own model: anymla inspect MODEL"
    return Group(
        table(_title(outcome), COLUMNS, _rows(outcome)), Text(_how(outcome)), *said, Text(f"\n{wrote}\n{ahead}")
    )


def demo_page(outcome: DemoOutcome) -> Page:
    """The page: the chart, the table, and the answers side by side."""
    answers = [tuple(map(Cell, (each.prompt, each.original, each.converted))) for each in outcome.answers]
    folder = quote(str(outcome.output / "model"))
    return Page(
        title=_title(outcome),
        lead=_how(outcome),
        sections=(
            Section(heading="Quality against bytes", charts=(_chart(outcome),), tables=(_page_table(outcome),)),
            Section(
                heading="The same questions to both",
                tables=(Table(columns=("asked", "original", outcome.converted), rows=tuple(answers), texts=True),),
            ),
            Section(
                heading="Use it",
                text="The conversion is an ordinary checkpoint, in the folder model beside this page.",
                commands=(Command("Talk with it", f"anymla chat {folder}"),),
            ),
            record(RESULTS, outcome.to_dict()),
        ),
    )


def _chart(outcome: DemoOutcome) -> Chart:
    """Perplexity against bytes of the cache, a series per method."""
    points: dict[str, list[tuple[float, float]]] = {}
    for each in outcome.contenders:
        if each.scores is not None:
            place = (float(each.scores.cache_bytes_per_token), each.scores.perplexity)
            points.setdefault(each.method, []).append(place)
    return Chart(
        title="Perplexity against the bytes of the KV cache",
        x_label="KV cache, measured bytes per token",
        y_label="perplexity (log scale)",
        series=tuple(Series(name=name, points=tuple(sorted(found))) for name, found in points.items()),
        level=("original", outcome.original.perplexity),
        log=True,
    )


def _page_table(outcome: DemoOutcome) -> Table:
    values = [_values(outcome.original), *(_values(each.scores) for each in outcome.contenders)]
    rows = [
        (Cell(name), *(Cell(text, value) for text, value in zip(texts, found, strict=True)))
        for (name, *texts), found in zip(_rows(outcome), values, strict=True)
    ]
    return Table(columns=COLUMNS, rows=tuple(rows))


def _values(scores: Scores | None) -> tuple[float | None, ...]:
    """The numbers by which a row sorts."""
    if scores is None:
        return (None,) * (len(COLUMNS) - 1)
    cache = scores.cache_bytes_per_token
    return (cache, cache, scores.cache_window_bytes, scores.perplexity, scores.kl, scores.top1_agreement)


def _title(outcome: DemoOutcome) -> str:
    return f"{outcome.model} with a smaller KV cache"


def _how(outcome: DemoOutcome) -> str:
    return (
        f"Nothing was trained. Scores are of {outcome.original.tokens:,} tokens of TinyStories that calibration did "
        "not see. anymla is shown with --decode-cost any, its best. The default decodes faster and loses more. Bytes "
        "are measured from the live cache. KL (nats per token) and the same top token are to the original."
    )


def _rows(outcome: DemoOutcome) -> list[tuple[str, ...]]:
    full = outcome.original.cache_bytes_per_token
    return [_row("original", outcome.original, full), *(_contender_row(each, full) for each in outcome.contenders)]


def _contender_row(contender: Contender, full: int) -> tuple[str, ...]:
    if contender.scores is not None:
        return _row(contender.method, contender.scores, full)
    return (contender.method, "-", _share(contender.budget), "-", "does not fit", "-", "-")


def _row(name: str, scores: Scores, full: int) -> tuple[str, ...]:
    each, once = scores.cache_bytes_per_token, scores.cache_window_bytes
    return (
        name,
        f"{each:,}",
        _share(each / full),
        size(once) if once else "-",
        f"{scores.perplexity:.2f}",
        f"{scores.kl or 0:.3f}",
        _share(round(scores.top1_agreement or 0, 3)),
    )


def _share(kept: float) -> str:
    return f"{100 * kept:.4g} %"

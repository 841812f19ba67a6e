"""What `anymla demo` shows, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources
from shlex import quote
from string import Template
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from anymla.report.tables import size, table

if TYPE_CHECKING:
    from anymla.demo import Contender, DemoOutcome
    from anymla.evaluation.scores import Scores

COLUMNS = ("method", "bytes/token", "kept", "+ once", "perplexity", "KL", "top-1")


def demo_shown(outcome: DemoOutcome) -> Group:
    """The table, and what both models answer, for the terminal."""
    said = [
        Text.assemble("\n" if who == "asked" else "", (f"{who}: ", "bold"), text)
        for answer in outcome.answers
        for who, text in zip(
            ("asked", "original", outcome.converted), (answer.prompt, answer.original, answer.converted), strict=True
        )
    ]
    wrote = f"Wrote {outcome.output / 'index.html'} and {outcome.output / 'model'} in {outcome.seconds:.0f} s."
    ahead = f"Next: anymla chat {quote(str(outcome.output / 'model'))}. On your own model: anymla inspect MODEL"
    return Group(
        table(_title(outcome), COLUMNS, _rows(outcome)), Text(_how(outcome)), *said, Text(f"\n{wrote}\n{ahead}")
    )


def demo_page(outcome: DemoOutcome) -> str:
    """The page: the plot, which lies beside it as quality.png, the table, the answers side by side."""
    template = (resources.files("anymla") / "report" / "demo.html").read_text(encoding="utf-8")
    own = ["own" if contender.method == outcome.own else "" for contender in outcome.contenders]
    answers = ((answer.prompt, answer.original, answer.converted) for answer in outcome.answers)
    return Template(template).substitute(
        title=escape(_title(outcome)),
        columns=_cells(COLUMNS, "th"),
        rows="\n".join(
            f'<tr class="{kind}">{_cells(row)}</tr>' for kind, row in zip(["", *own], _rows(outcome), strict=True)
        ),
        how=escape(_how(outcome)),
        converted=escape(outcome.converted),
        answers="\n".join(f"<tr>{_cells(row)}</tr>" for row in answers),
    )


def _cells(texts: Iterable[str], kind: str = "td") -> str:
    return "".join(f"<{kind}>{escape(text)}</{kind}>" for text in texts)


def _title(outcome: DemoOutcome) -> str:
    return f"{outcome.model} with a smaller KV cache"


def _how(outcome: DemoOutcome) -> str:
    return (
        f"Nothing was trained. Scores are of {outcome.original.tokens:,} tokens of TinyStories that calibration did "
        "not see. anymla is shown with --decode-cost any, its best. The default decodes faster and loses more. Bytes "
        "are measured from the live cache. KL (nats per token) and top-1 agreement are to the original."
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

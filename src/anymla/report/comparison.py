"""What `anymla compare` shows, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anymla.cards import public_name
from anymla.report.costs import outcomes_table, quality_charts, tiles
from anymla.report.page import Command, Page, Section, record
from anymla.report.results import RESULTS
from anymla.report.run import costs_table

if TYPE_CHECKING:
    from anymla.comparison import ComparedModel, ModelComparison
    from anymla.report.terminal import FittedTable


def comparison_table(comparison: ModelComparison) -> FittedTable:
    """Draws bytes and quality of every model."""
    return costs_table(f"On {comparison.settings['text']}", "model", _named(comparison))


def comparison_page(comparison: ModelComparison, content: Mapping[str, Any]) -> Page:
    """The page of a comparison; ``content``: what results.json holds."""
    outcomes, settings = _named(comparison), comparison.settings
    first, *others = comparison.models
    tokens, text = first.quality.tokens, settings["text"]
    notes = " ".join(f"{each.name}: {note}." for each in comparison.models for note in each.notes)
    return Page(
        title=f"{len(outcomes)} models on the same text",
        lead=(
            f"Measured by anymla {comparison.versions['anymla']} on {tokens:,} tokens of {public_name(text)}. KL and "
            f"agreement are to {public_name(settings['teacher'])}. Bytes of weights are those stored, bytes of the "
            "cache are those of its tensors."
        ),
        tiles=tiles(first, others[0], sum(each.seconds for each in comparison.models)) if len(others) == 1 else (),
        sections=(
            Section(heading="Side by side", text=notes, tables=(outcomes_table(outcomes, "model"),)),
            Section(heading="Quality against bytes", charts=tuple(quality_charts(outcomes))),
            Section(heading="The command", commands=(Command("Measures it again", content["command"]),)),
            record(RESULTS, content),
        ),
    )


def _named(comparison: ModelComparison) -> dict[str, ComparedModel]:
    """The models by the shortest names that tell them apart."""
    full = [each.name for each in comparison.models]
    short = [name.rstrip("/").rpartition("/")[2] for name in full]
    names = short if len({*short}) == len(short) else full
    return dict(zip(names, comparison.models, strict=True))

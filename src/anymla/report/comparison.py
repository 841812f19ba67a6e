"""What `anymla compare` shows, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anymla.cards import public_name
from anymla.report.costs import outcomes_table, quality_charts, tiles
from anymla.report.page import Command, Page, Section, record
from anymla.report.results import RESULTS
from anymla.report.run import costs_table
from anymla.report.units import text_read

if TYPE_CHECKING:
    from anymla.comparison import ComparedModel, ModelComparison
    from anymla.report.terminal import FittedTable

READING = "reading (s)"  # seconds that a model took to read the text


def comparison_table(comparison: ModelComparison) -> FittedTable:
    """Draws bytes and quality of every model."""
    return costs_table(f"On {_read(comparison)}", "model", _named(comparison), READING)


def _read(comparison: ModelComparison) -> str:
    """What text, how much of it, in what windows."""
    settings, tokens = comparison.settings, comparison.models[0].quality.tokens
    return text_read(public_name(settings["text"]), tokens, settings["length"])


def comparison_page(comparison: ModelComparison, content: Mapping[str, Any]) -> Page:
    """The page of a comparison; ``content``: what results.json holds."""
    outcomes, settings = _named(comparison), comparison.settings
    first, *others = comparison.models
    notes = " ".join(f"{each.name}: {note}." for each in comparison.models for note in each.notes)
    return Page(
        title=f"{len(outcomes)} models on the same text",
        lead=(
            f"Measured by anymla {comparison.versions['anymla']} on {_read(comparison)}. KL and agreement are to "
            f"{public_name(settings['teacher'])}; ± is a standard error over windows. Bytes of weights are those "
            "stored, bytes of the cache are those of its tensors."
        ),
        tiles=tiles(first, others[0], sum(each.seconds for each in comparison.models)) if len(others) == 1 else (),
        sections=(
            Section(heading="Side by side", text=notes, tables=(outcomes_table(outcomes, "model", READING),)),
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

"""What a run tells: bytes and quality after every step, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anymla import __version__
from anymla.cards import public_name
from anymla.methods.mla.settings import MLA
from anymla.report.costs import (
    BITS,
    Outcome,
    layers_section,
    outcomes_table,
    papers_section,
    quality_charts,
    tiles,
    use_section,
)
from anymla.report.page import Page, Section, record
from anymla.report.terminal import FittedTable, table
from anymla.report.units import measured, size
from anymla.run_outcome import Cost, Quality, RunReport, StepOutcome

SHORT = {BITS: "bits", "KL (nats per token)": "KL"}  # on a terminal
STEP = "seconds"  # that a step took


def run_table(report: RunReport) -> FittedTable:
    """Draws bytes of the original and of every step's model, and their quality where a text was given."""
    return costs_table(str(report.output), "after step", _named(report), STEP)


def costs_table(title: str, first: str, outcomes: Mapping[str, Outcome], seconds: str) -> FittedTable:
    """A row per model, for the terminal; ``first``: what the names are; ``seconds``: what took them."""
    shown = outcomes_table(outcomes, first, seconds)
    columns = [SHORT.get(column, column.removeprefix("cache ")) for column in shown.columns]
    return table(title, columns, ([cell.text for cell in row] for row in shown.rows))


def _named(report: RunReport) -> dict[str, StepOutcome]:
    return {"original": report.original} | {f"{at} {step.name}": step for at, step in enumerate(report.steps, 1)}


def run_page(report: RunReport, folder: Path) -> Page:
    """The page of a run; ``folder`` holds what lies beside it: the last step's checkpoint and its account."""
    outcomes = _named(report)
    recipe, last = report.recipe, report.steps[-1]
    original = str(recipe.teacher or recipe.model)
    names = ", then ".join(step.name for step in recipe.steps)
    converting = next((step for step in recipe.steps if isinstance(step, MLA)), None)
    return Page(
        title=f"{public_name(str(recipe.model))} after {names}",
        lead=_lead(report),
        tiles=tiles(report.original, last, report.seconds),
        sections=(
            Section(heading="After each step", tables=(outcomes_table(outcomes, "after step", STEP),)),
            Section(heading="Quality against bytes", charts=tuple(quality_charts(outcomes))),
            layers_section(folder, before=report.original.account.cache_bytes_per_token),
            use_section(folder, report.output, original, converting),
            papers_section(recipe.steps),
            record("run.json", report.to_dict()),
        ),
    )


def _lead(report: RunReport) -> str:
    made = f"Made by anymla {__version__}. Bytes are those of tensors."
    quality = report.steps[-1].quality
    if quality is None or report.recipe.text is None:
        return f"{made} No text was given, so quality was not measured: give --text."
    text = public_name(report.recipe.text)
    return f"{made} Quality was measured on {quality.tokens:,} tokens of {text}; KL and agreement are to the original."


def outcome_line(number: int, outcome: StepOutcome) -> str:
    """Describes bytes and quality of the model after a step, in one line."""
    cost, quality = outcome.account, outcome.quality
    weights, token, once, at = _costs(cost)
    if cost.bits_per_weight is not None:
        weights += f" ({cost.bits_per_weight:.2f} bits per packed weight)"
    line = f"{f'after step {number}, ' if number else ''}{outcome.name}: weights {weights}, cache {token} per token"
    line += f"{f' and {once} once' if cost.cache_bytes_once else ''}, {at} at {cost.context:,} tokens"
    if quality is None:
        return line
    perplexity, kl, top1 = _scores(quality)
    return f"{line}; perplexity {perplexity}" + ("" if quality.kl is None else f", KL {kl}, same top token {top1}")


def _costs(cost: Cost) -> tuple[str, str, str, str]:
    """Bytes of weights, of a token's cache, of what is there once, and of the cache at the context."""
    weights = "?" if cost.weight_bytes is None else size(cost.weight_bytes)
    return weights, size(cost.cache_bytes_per_token), size(cost.cache_bytes_once), size(cost.cache_bytes_at_context)


def _scores(quality: Quality) -> tuple[str, str, str]:
    """Perplexity, KL and same top token."""
    kl = measured(quality.kl, quality.kl_error)
    top1 = "-" if quality.top1_agreement is None else f"{quality.top1_agreement:.1%}"
    return f"{quality.perplexity:.3f}", kl, top1

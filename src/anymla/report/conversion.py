"""The page of a conversion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.cards import public_name
from anymla.io.checkpoint import ACCOUNT
from anymla.io.config import read_object
from anymla.methods.cache_coding.explain import share_note
from anymla.report.costs import (
    layers_section,
    papers_section,
    quality_tiles,
    use_section,
)
from anymla.report.page import Cell, Page, Section, Table, Tile, number, record
from anymla.report.units import duration, measured, share, size

if TYPE_CHECKING:
    from anymla.evaluation.scores import Scores
    from anymla.outcomes import CodedConversion, Conversion


def conversion_page(report: Conversion | CodedConversion, folder: Path) -> Page:
    """The page of a conversion; ``folder`` holds what lies beside it: the checkpoint and its account."""
    before, after = report.before, report.after
    kept = share(after.cache_bytes_per_token, before.cache_bytes_per_token)
    return Page(
        title=f"{public_name(report.model)} with {kept} of its KV cache per token",
        lead=(
            f"Made by anymla {report.anymla_version} with the step {report.method.name}. Scores are on "
            f"{after.tokens:,} tokens of calibration text that was held out; KL and agreement are to the original. "
            "Bytes of the cache per token are measured from its tensors."
        ),
        tiles=(*_cache_tiles(report), *quality_tiles(after, before.perplexity), Tile("Time", duration(report.seconds))),
        sections=(
            Section(heading="Before and after", text=_notes(report), tables=(_scores_table(report),)),
            layers_section(folder, _errors(report), before.cache_bytes_per_token),
            use_section(folder, report.output, report.model, report.method),
            papers_section([report.method]),
            record("conversion.json", report.to_dict()),
            record(ACCOUNT, read_object(folder / ACCOUNT)),
        ),
    )


def _notes(report: Conversion | CodedConversion) -> str:
    """What was done to the files, and how codes count their share."""
    coded = any(layer.coded is not None for layer in report.spec.layers)
    counted = share_note(report.spec.dtype) if coded else None
    notes = report.notes if counted is None else (*report.notes, counted)
    return " ".join(f"{note[0].upper()}{note[1:]}." for note in notes)


def _cache_tiles(report: Conversion | CodedConversion) -> Iterator[Tile]:
    length, held = list(report.cache_bytes_at.items())[-1]
    note = f"of {size(held['before'])}: {share(held['after'], held['before'])}"
    yield Tile(f"Cache at {int(length):,} tokens", size(held["after"]), note)


def _errors(report: Conversion | CodedConversion) -> dict[int, float]:
    """Each layer's error, where the step tells it."""
    return {each.layer: each.error for each in report.layers if not isinstance(each, dict)}


def _scores_table(report: Conversion | CodedConversion) -> Table:
    lengths = list(report.cache_bytes_at)
    columns = (
        *("model", "perplexity", "KL (nats per token)", "same top token", "cache per token", "+ once"),
        *(f"cache at {int(length):,} tokens" for length in lengths),
    )
    rows = []
    for name, when, scores in (("original", "before", report.before), ("converted", "after", report.after)):
        held = [report.cache_bytes_at[length][when] for length in lengths]
        sizes = (scores.cache_bytes_per_token, scores.cache_window_bytes, *held)
        rows.append((Cell(name), *scores_cells(scores), *(number(size(each), each) for each in sizes)))
    return Table(columns=columns, rows=tuple(rows))


def scores_cells(scores: Scores) -> Iterator[Cell]:
    """Perplexity, KL and agreement."""
    yield number(f"{scores.perplexity:.3f}", scores.perplexity)
    yield number(measured(scores.kl, scores.kl_error), scores.kl)
    yield number("-" if scores.top1_agreement is None else f"{scores.top1_agreement:.1%}", scores.top1_agreement)

"""A conversion to a cache of codes: the method's sweep, scores on held-out text, and a report beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from anymla.account import account
from anymla.cards import scores_shown, step_card
from anymla.io.sources.plain import Plain
from anymla.methods.base import LayerMethod
from anymla.methods.cache_coding.duration import faster
from anymla.modeling.spec import ModelSpec
from anymla.outcomes import CodedConversion
from anymla.recipe import Recipe
from anymla.swept_report import reported

Progress = Callable[[int, int, dict[str, Any] | str | None], None]


def convert_coded(
    method: LayerMethod,
    model: str,
    source: Plain,
    spec: ModelSpec,
    output: Path,
    progress: Progress | None,
    *,
    started: float,
    memory: int,
    shard_size: int,
    restart: bool,
    note: Callable[[str], None] | None,
) -> CodedConversion:
    """Runs ``method`` over ``source``, the plain files of ``model``, and writes ``output`` with its report.

    ``memory``, ``shard_size``, ``restart``, ``progress``, ``note``: as of :class:`anymla.sweep.run.Run`; ``progress``
    also gets the name of each pass of calibration through a layer. ``started``: when the call began, by
    ``time.monotonic``.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    from anymla.distributed import rank
    from anymla.sweep.run import Run, swept

    run = Run(
        output=output,
        memory=memory,
        shard_size=shard_size,
        restart=restart,
        progress=progress,
        surveyed=progress,
        faster=partial(faster, spec, method),
        note=note,
    )
    with swept(method, source.folder, spec, run) as done:
        before, after = account(replace(spec, dtype=done.spec.dtype)), account(done.spec)
        report = CodedConversion(
            model=model,
            method=method,
            layers=tuple(record.result for record in done.records if record.result is not None),
            cache_bytes_at={
                length: {"before": held, "after": after.cache_bytes_at[length]}
                for length, held in before.cache_bytes_at.items()
            },
            **reported(done, source, output, (before, after), started),
        )
        if rank() == 0:
            _write_report(done.folder, report)
    return report


def _write_report(folder: Path, report: CodedConversion) -> None:
    from anymla.report.conversion import conversion_page

    recipe = Recipe.of({"model": report.model, "steps": [report.method]})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    card = step_card(report.method, report.model, None, scores_shown(report.to_dict()))
    (folder / "README.md").write_text(card, encoding="utf-8")
    conversion_page(report, folder).write(folder)

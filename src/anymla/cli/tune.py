"""tune."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anymla.cli.options import (
    Adapter,
    Json,
    Revision,
    app,
    err,
    first_process,
    how_to_go_on,
    options_of,
    out,
    print_json,
    print_next,
    print_note,
)
from anymla.cli.progress import Report, shown
from anymla.methods.tune import STEP, Tune
from anymla.recipe import read_tune

if TYPE_CHECKING:
    from anymla.training.logs import Progress, TuneProgress


def tuning_progress(report: Report) -> Progress:
    """Reports each step, with tokens per second of this run."""
    begun, tokens, since = "", 0, time.monotonic()

    def progress(now: TuneProgress) -> None:
        nonlocal begun, tokens, since
        if now.loss is None:
            err.print(f"going on after step {now.step} of {now.steps}; --restart begins anew")
            begun, tokens, since = now.what, now.tokens, time.monotonic()
            return report(now.step, now.steps, now.what)
        if now.what != begun:  # the first step tells when it ends
            begun, tokens, since = now.what, now.tokens, time.monotonic()
        rate = (now.tokens - tokens) / max(time.monotonic() - since, 1e-9)
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        report(now.step, now.steps, now.what, f"{now.stage}, loss {now.loss:.4f}{speed}")
        if now.step == now.steps and now.what == STEP:
            report(0, None, "scoring and writing")

    report(0, None, "reading, then the first step")
    return progress


@app.command()
@options_of(Tune)
def tune(
    converted: Annotated[
        str, typer.Argument(help="A folder that anymla convert wrote, or a hub id.", show_default=False)
    ],
    settings: dict[str, Any],
    teacher: Annotated[
        str, typer.Option(help="The original model: a local folder or a hub id, also org/name@revision.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the tuned model to.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="A YAML file with any of these settings, or the name of a recipe that comes with "
            "anymla, such as paper. Options override it.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, and discard the work of a stopped tuning to the same folder.")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard or trackio, beside metrics.jsonl. Repeat it for both.")
    ] = None,
    revision: Revision = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Train a converted model until it gives what the original gave."""
    base = {} if recipe is None else read_tune(recipe)
    chosen = Tune.of(base | settings, "settings")
    from anymla.training.tune import tune as tune_model

    with shown("tune") as report_steps, how_to_go_on():
        report = tune_model(
            converted,
            output,
            teacher=teacher,
            recipe=chosen,
            overwrite=overwrite,
            restart=restart,
            report_to=report_to,
            revision=revision,
            adapter=adapter,
            progress=tuning_progress(report_steps),
            note=print_note if first_process() else None,
        )
    if not first_process():
        return
    if as_json:
        return print_json(report.to_dict())
    if not report.helped:
        err.print("note: nothing was better than the model as it came, so its weights are unchanged", soft_wrap=True)
    from anymla.report.tables import recovery_table

    out.print(recovery_table(report))
    print_next(output, teacher, report.seconds)

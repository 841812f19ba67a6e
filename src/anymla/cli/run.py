"""run, methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from anymla.cli.options import Json, app, err, first_process, how_to_go_on, out, print_json
from anymla.cli.progress import Report, shown
from anymla.errors import RecipeError
from anymla.methods.base import Method, all_methods
from anymla.recipe import composes_with, shipped_names

if TYPE_CHECKING:
    from anymla.runner import Progress, StepOutcome, StepProgress


@app.command()
def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="With --step a model; else a recipe: a YAML file or the name of one that comes with anymla.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model of the last step to.")],
    step: Annotated[
        list[str] | None,
        typer.Option(help="A step and its settings, as 'mla: {kv_cache: 0.25}' or 'tune'; again for the next one."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to run a recipe on, in place of its own.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The original, where the model is not it, for tuning and scores.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to score the model on after every step.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens at which the cache's size is told. Default: the model's context.")
    ] = None,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Keep the checkpoints between the steps, in OUT-steps.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where a stopped run to the same folder left work.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the steps of a recipe, one after the other; after each the model's bytes are shown."""
    if step and model is not None:
        raise RecipeError("--model is for a recipe: with --step the model stands before the options")
    from anymla import runner

    speaks = first_process()
    with shown("run") as report, how_to_go_on():
        outcome = runner.run(
            source if step else model,
            output,
            None if not step else [_parsed(each) for each in step],
            recipe=None if step else source,
            teacher=teacher,
            text=text,
            context=context,
            overwrite=overwrite,
            restart=restart,
            keep_steps=keep_steps,
            progress=_progress(report),
            done=_tell if speaks and not as_json else None,
        )
    if not speaks:
        return
    if as_json:
        return print_json(outcome.to_dict())
    from anymla.report.runs import run_table

    out.print(run_table(outcome))
    out.print(f"Wrote {output}. Next: anymla eval {output} --against {outcome.recipe.model} --text YOUR.txt")


def _parsed(step: str) -> Any:
    try:
        return yaml.safe_load(step)
    except yaml.YAMLError as error:
        raise RecipeError(f"--step {step:.60} cannot be read: {' '.join(str(error).split()):.200}") from error


def _progress(report: Report) -> Progress:
    def progress(now: StepProgress) -> None:
        report(now.done, now.total, f"step {now.step} of {now.steps}, {now.name}:", now.detail)

    return progress


def _tell(outcome: StepOutcome) -> None:
    """Says how large the model is after a step."""
    from anymla.report.tables import size

    account, quality = outcome.account, outcome.quality
    weights = "" if account["weight_bytes"] is None else f"weights {size(account['weight_bytes'])}, "
    scored = "" if quality is None else f", perplexity {quality['perplexity']:.2f}, KL {quality['kl']:.3f}"
    err.print(
        f"{outcome.name}: {weights}cache {account['cache_bytes_per_token']:,.0f} bytes per token, "
        f"{size(account['cache_bytes_at_context'])} at the context{scored}; {outcome.seconds:.0f} s",
        soft_wrap=True,
    )


@app.command()
def methods(as_json: Json = False) -> None:
    """List the steps that recipes are made of: what each saves, its paper, what it goes together with."""
    known = list(all_methods().values())
    rows = [_described(method, known) for method in known]
    if as_json:
        return print_json(rows)
    from anymla.report.runs import methods_table

    out.print(methods_table(rows))
    out.print(f"Recipes that come with anymla: {', '.join(shipped_names())}. Next: anymla run RECIPE -o OUT")


def _described(method: type[Method], known: list[type[Method]]) -> dict[str, Any]:
    """A method under the stable JSON names."""
    return {
        "name": method.name,
        "paper": method.paper.link or method.paper.title,
        "phase": method.phase.name.lower(),
        "saves": list(method.saves),
        "composes_with": composes_with(method, known),
        "summary": method.summary,
    }

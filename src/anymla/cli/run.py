"""run, methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anymla.cli.convert import conversion_progress
from anymla.cli.options import Json, app, first_process, how_to_go_on, out, print_json, print_next, print_note
from anymla.cli.progress import Report, shown
from anymla.cli.tune import tuning_progress
from anymla.errors import RecipeError, did_you_mean
from anymla.methods.base import Method, all_methods
from anymla.recipe import Recipe, composes_with, given_recipe
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.run_outcome import StepOutcome


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's YAML file, the name of one that comes with anymla, or, with --step, a model.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the last step's model to.")],
    step: Annotated[
        list[str] | None,
        typer.Option(help="A step in YAML, such as 'mla: {kv_cache: 0.25}' or tune. Repeat it for the next step."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting that replaces the recipe's, such as tune.data=TEXT. Repeat it for more."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model. It replaces the recipe's.")] = None,
    teacher: Annotated[str | None, typer.Option(help=Recipe.model_fields["teacher"].description)] = None,
    text: Annotated[str | None, typer.Option(help=Recipe.model_fields["text"].description)] = None,
    context: Annotated[
        int | None, typer.Option(min=1, max=MOST, help=Recipe.model_fields["context"].description)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, and discard the work of a stopped run to the same folder.")
    ] = False,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Keep the checkpoints between the steps, in OUT-steps.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a model through the steps of a recipe."""
    changes = {"model": model, "teacher": teacher, "text": text, "context": context}
    chosen = given_recipe(recipe, step or [], settings or [], changes)
    from anymla.runner import run as run_steps

    with shown("run") as report, how_to_go_on():
        done = run_steps(
            chosen,
            output,
            overwrite=overwrite,
            restart=restart,
            keep_steps=keep_steps,
            progress=_progress(report, len(chosen.steps)),
            told=None if as_json else _tell,
            note=print_note if first_process() else None,
        )
    if not first_process():
        return
    if as_json:
        return print_json(done.to_dict())
    from anymla.report.run import run_table

    out.print(run_table(done))
    if chosen.text is None:
        out.print("Quality was not measured: --text YOUR.txt measures it after every step.", soft_wrap=True)
    print_next(output, str(chosen.teacher or chosen.model), done.seconds)


def _progress(report: Report, steps: int) -> Callable[..., None]:
    """Reports the progress of each step as its own command does, under the step's name."""
    telling: dict[int, Callable[..., None]] = {}

    def progress(number: int, step: Method, *told: Any) -> None:
        def named(done: int, total: int | None, what: str, *rest: Any, **details: Any) -> None:
            report(done, total, f"step {number} of {steps}, {step.name}: {what}", *rest, **details)

        if number not in telling:
            own: dict[str, Callable[[Report], Callable[..., None]]] = {
                "mla": conversion_progress,
                "tune": tuning_progress,
            }
            telling[number] = own.get(step.name, _layers)(named)
        if told:
            telling[number](*told)

    return progress


def _layers(report: Report) -> Callable[..., None]:
    """Reports each layer of a step."""
    report(0, None, "reading")
    return lambda done, total, result: report(done, total, result if isinstance(result, str) else "layer")


def _tell(number: int, outcome: StepOutcome) -> None:
    """Prints what the model is after a step, as soon as it is known."""
    from anymla.report.run import outcome_line

    out.print(outcome_line(number, outcome), soft_wrap=True)


@app.command()
def methods(
    step: Annotated[
        str | None, typer.Argument(help="A step, to see its settings. Default: all steps.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the steps that a recipe can have, in the order in which they run; or show one step with its settings."""
    from anymla.report.methods import example, method_shown, methods_table, settings_of

    by_name = all_methods()
    known = list(by_name.values())
    if step is not None and step not in by_name:
        raise RecipeError(f"{step!s:.40} is no step{did_you_mean(step, by_name)}; the steps are {', '.join(by_name)}")
    if as_json:
        facts = [_facts(each, known) for each in known if step in (None, each.name)]
        own = {"settings": settings_of(by_name[step]), "example": example(by_name[step])} if step else {}
        return print_json(facts[0] | own if step else facts)
    out.print(methods_table(known) if step is None else method_shown(by_name[step], known))


def _facts(method: type[Method], known: list[type[Method]]) -> dict[str, Any]:
    """What a step is, under its JSON names."""
    return {
        "name": method.name,
        "paper": method.paper.link or method.paper.title,
        "phase": method.phase.name.lower(),
        "saves": list(method.saves),
        "composes_with": composes_with(method, known),
        "summary": method.summary,
    }

"""inspect, plan, convert, demo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anymla import pipeline
from anymla.cli.options import (
    Codec,
    Json,
    Model,
    RecipeFile,
    Revision,
    app,
    file_recipe,
    first_process,
    how_to_go_on,
    out,
    print_json,
    print_next,
    print_note,
    print_page,
    recipe_options,
)
from anymla.cli.progress import Report, shown
from anymla.codec_choice import AUTO, NONE, Choice
from anymla.errors import RecipeError
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.cache_coding.explain import share_note
from anymla.methods.mla.plan import MLAPlan
from anymla.methods.mla.settings import MLA
from anymla.outcomes import CodedConversion, Conversion

if TYPE_CHECKING:
    from anymla.methods.mla.choose import LayerResult

FEW_TOKENS = 4096  # scores of fewer are rough


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("anymla-demo"),
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Convert the tiny model that comes with anymla, and fetch nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert SmolLM2-135M-Instruct to an eighth of its cache, ask both the same, compare with other methods."""
    from anymla.demo import run_demo

    with shown("demo") as report:
        outcome = run_demo(output, bundled=bundled, report=report, note=print_note)
    if as_json:
        return print_json(outcome.to_dict())
    from anymla.report.demo import demo_shown

    out.print(demo_shown(outcome))


@app.command()
def inspect(
    model: Model,
    targets: Annotated[bool, typer.Option("--targets", help="Show which engines' layouts can hold it.")] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a model is, whether it can be converted, and what its cache costs. Reads its config alone."""
    inspection = pipeline.inspect(model, revision=revision)
    if as_json:
        return print_json(inspection.to_dict())
    from anymla.report.tables import inspection_table, targets_table

    if targets and inspection.already_latent:
        return out.print(
            f"{inspection.model}: {inspection.reason}. Engines that know its own layout serve it unchanged. A folder "
            "that anymla convert wrote goes to them with anymla export.",
            soft_wrap=True,
        )
    out.print(targets_table(inspection) if targets and inspection.supported else inspection_table(inspection))


@app.command()
@recipe_options
def plan(
    model: Model,
    settings: dict[str, Any],
    recipe: RecipeFile = None,
    codec: Codec = AUTO,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Read weights and calibration text too, and predict what codes lose at many budgets and three costs "
            "of decoding.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the plan of the step mla to this YAML file. With --curve: folder for results.json and "
            "report.html.",
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Dry run: what every layer becomes and what it costs, from the config alone."""
    unasked = output is not None and codec == AUTO and recipe is None and not curve
    used = NONE if unasked else codec
    choice = pipeline.choose(model, file_recipe(recipe), codec=used, revision=revision, **settings)
    choice = replace(choice, why="a plan file exists only for that step") if unasked else choice
    if curve:
        return _curve(model, choice, output, revision, as_json=as_json)
    if not isinstance(choice.method, MLA):
        if output is not None:
            raise RecipeError(f"--output {output}: a plan file exists only for the step mla: add --codec none")
        return _show_codes(pipeline.plan_codes(model, choice.method, revision=revision), choice, as_json=as_json)
    planned = pipeline.plan(model, choice.method, revision=revision)
    costs = pipeline.explain_plan(planned)
    if output is not None:
        try:
            output.write_text(planned.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--output {output} cannot be written: {error.strerror}") from error
    if as_json:
        return print_json(costs)
    from anymla.report.tables import plan_table

    _tell(choice)
    out.print(plan_table(costs))
    if output is not None:
        out.print(f"Wrote {output}. Next: anymla convert {planned.model} -o OUT --plan {output}")


@app.command()
@recipe_options
def convert(
    model: Model,
    settings: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the converted model to.")],
    codec: Codec = AUTO,
    recipe: RecipeFile = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml of `anymla plan`, instead of a recipe.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Begin anew, and discard the work of a stopped conversion to the same folder."),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory for calibration activations, such as 8GB. The rest goes to files beside OUT. "
            "[default: a quarter of the memory]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a model's KV cache smaller: codes of keys and values, or multi-head latent attention."""
    if plan is not None and (recipe is not None or settings.keys() - {"device"}):
        raise RecipeError("--plan is final: change the recipe and plan again, or leave --plan out")
    chosen = MLAPlan.read(plan) if plan is not None else file_recipe(recipe)
    told: list[str] = []
    with shown("convert") as report, how_to_go_on():
        conversion = pipeline.convert(
            model,
            output,
            chosen,
            codec=codec,
            revision=revision,
            overwrite=overwrite,
            restart=restart,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            progress=conversion_progress(report),
            notify=print_note if first_process() else None,
            told=told.append,
            **settings,
        )
    if first_process():
        _show_conversion(conversion, output, told, as_json=as_json)


def _show_conversion(conversion: Conversion | CodedConversion, output: Path, told: list[str], *, as_json: bool) -> None:
    """What a conversion ends with; ``told``: lines of before it began."""
    for note in _notes(conversion):
        print_note(note)
    if as_json:
        return print_json(conversion.to_dict())
    from anymla.report.tables import coded_layers_table, conversion_layers_table, scores_table

    for line in told:
        out.print(line, soft_wrap=True)
    if isinstance(conversion, CodedConversion):
        out.print(coded_layers_table(conversion))
    else:
        out.print(conversion_layers_table(conversion))
    scored = {"original": conversion.before, "converted": conversion.after}
    out.print(scores_table(scored, "On held-out calibration text"))
    if conversion.after.tokens < FEW_TOKENS:
        out.print(
            "Scores of so few tokens are a rough check. anymla compare measures on a text of yours.", soft_wrap=True
        )
    print_next(output, conversion.model, conversion.seconds, conversion.method)


def conversion_progress(report: Report) -> pipeline.Progress:
    """Reports each layer, and what comes before and after them."""

    def progress(done: int, total: int, result: LayerResult | dict[str, Any] | str | None) -> None:
        if isinstance(result, str):
            return report(done, total, result)
        what = "" if result is None or isinstance(result, dict) else f"2K={result.rope_dims} r={result.kv_rank}"
        report(done, total, "layer", what)
        if done == total:
            report(0, None, "scoring and writing")

    report(0, None, "reading")
    return progress


def _tell(choice: Choice) -> None:
    if choice.told is not None:
        out.print(choice.told, soft_wrap=True)


def _show_codes(planned: dict[str, Any], choice: Choice, *, as_json: bool) -> None:
    """What `anymla plan` shows of codes."""
    if as_json:
        return print_json(planned)
    from anymla.report.tables import codes_table

    _tell(choice)
    out.print(codes_table(planned))


def _curve(model: str, choice: Choice, output: Path | None, revision: str | None, *, as_json: bool) -> None:
    """What `anymla plan --curve` shows and writes."""
    from anymla.report.results import check_folder, write_results
    from anymla.report.trade_off import curve_page, curve_tables
    from anymla.trade_off import plan_curve

    if not isinstance(choice.method, TransformCoding):
        why = "" if choice.why is None else f" ({choice.why})"
        raise RecipeError(
            f"--curve shows budgets of the step transform_coding, and the step here is {choice.method.name}{why}: "
            "leave out --curve, or what chose that step"
        )
    if output is not None:
        check_folder(output)
    with shown("plan") as report:
        report(0, None, "reading")
        planned = plan_curve(model, choice.method, revision=revision, progress=report)
    content = planned | {"command": shlex.join(["anymla", *sys.argv[1:]])}
    if output is not None:
        write_results(output, content, curve_page(planned, content))
    if as_json:
        return print_json(content)
    _tell(choice)
    out.print(curve_tables(planned))
    if output is not None:
        print_page(output)


def _notes(conversion: Conversion | CodedConversion) -> Iterator[str]:
    """What the user should know of how the model was made."""
    from anymla.cards import static_norms_cost

    yield from conversion.notes
    if conversion.method.calibration is None:
        yield "calibrated on the bundled children's stories; text like yours (--calibration) keeps more quality"
    if (computing := conversion.computing).dtype != computing.stored:
        yield f"computed in {computing.dtype}, saved in {computing.stored}: {computing.reason}"
    if isinstance(conversion, CodedConversion):
        if (counted := share_note(conversion.spec.dtype)) is not None:
            yield counted
        return
    if lost := [layer.norms_lost for layer in conversion.layers if layer.norms_lost is not None]:
        yield (
            f"fixed scales replace norms on queries and keys; {static_norms_cost(lost)}; the scores include the whole "
            "loss"
        )

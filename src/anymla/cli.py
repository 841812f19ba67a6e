"""The command line. Torch is imported inside the commands only, so that help and inspect answer at once."""

from __future__ import annotations

import functools
import inspect as python_inspect
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console

from anymla import __version__, pipeline
from anymla.errors import AnymlaError, RecipeError
from anymla.planning.plan import Plan
from anymla.recipe import MOST, DtypeName, Recipe, read_yaml

app = typer.Typer(
    name="anymla",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plain = functools.partial(Console, highlight=False, markup=False, emoji=False)  # file names may hold brackets
out, err = plain(), plain(stderr=True)

Model = Annotated[str, typer.Argument(help="A local checkpoint folder or a hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML file with any of these settings; options override it.")
]
Device = Annotated[str, typer.Option(help=Recipe.model_fields["device"].description)]
Dtype = Annotated[DtypeName | None, typer.Option(help="Dtype to run in. Default: the checkpoint's.")]


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command`` an option per field of Recipe, and hands it the ones that were set as ``settings``."""

    @functools.wraps(command)
    def with_settings(**arguments: Any) -> None:
        settings = {name: arguments.pop(name) for name in Recipe.model_fields}
        command(**arguments, settings={name: value for name, value in settings.items() if value is not None})

    own = python_inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "settings"]
    for name, field in Recipe.model_fields.items():
        default = "" if field.default is None else f" [default: {field.default}]"
        option = typer.Option(help=f"{field.description}{default}", show_default=False)
        annotation: Any = Annotated[Optional[field.annotation], option]  # noqa: UP045
        kind = python_inspect.Parameter.KEYWORD_ONLY
        parameters.append(python_inspect.Parameter(name, kind, default=None, annotation=annotation))
    ordered = sorted(parameters, key=lambda parameter: parameter.default is not python_inspect.Parameter.empty)
    keyword_only = [parameter.replace(kind=python_inspect.Parameter.KEYWORD_ONLY) for parameter in ordered]
    with_settings.__signature__ = python_inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return with_settings


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _recipe(path: Path | None, settings: dict[str, Any]) -> Recipe:
    """The recipe file's settings, overridden by the options."""
    if path is None:
        return Recipe.of(settings, "settings")
    return Recipe.of(Recipe.of(read_yaml(path), str(path)).model_dump(exclude_unset=True) | settings, "settings")


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"anymla {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a trained Transformer into one with multi-head latent attention: the same model, a smaller KV cache."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("anymla-demo"),
    as_json: Json = False,
) -> None:
    """Convert the bundled model at several budgets, compare to the paper's method, and let it tell a story."""
    from anymla.report.demo import run_demo

    results = run_demo(output, None if as_json else out)
    if as_json:
        _print_json(results)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show what a model is, whether it can be converted, and what its cache costs. Reads its config alone."""
    inspection = pipeline.inspect(model)
    if as_json:
        return _print_json(inspection.to_dict())
    from anymla.report.tables import inspection_table

    out.print(inspection_table(inspection))


@app.command()
@recipe_options
def plan(
    model: Model,
    settings: dict[str, Any],
    recipe: RecipeFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this YAML file.")] = None,
    as_json: Json = False,
) -> None:
    """Dry run: what every layer becomes and what it costs, from the config alone."""
    planned = pipeline.plan(model, _recipe(recipe, settings))
    costs = pipeline.explain_plan(planned)
    if output is not None:
        try:
            output.write_text(planned.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--output {output} cannot be written: {error.strerror}") from error
    if as_json:
        return _print_json(costs)
    from anymla.report.tables import plan_table

    out.print(plan_table(costs))
    if output is not None:
        out.print(f"Wrote {output}. Next: anymla convert {model} -o OUT --plan {output}")


def _first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _layer_bar() -> Iterator[pipeline.Progress]:
    """A progress bar on stderr, a step per layer; none where stderr is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal or not _first_process(),
    ) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int, result: Any) -> None:
            text = f"layer {result.layer}: 2K={result.rope_dims} r={result.kv_rank}"
            bar.update(task, description=text, completed=done, total=total)

        yield progress


@contextmanager
def _how_to_go_on() -> Iterator[None]:
    """Ends a stopped conversion with what it says about itself."""
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.stderr.write("\n".join(getattr(stop, "__notes__", ["stopped"])) + "\n")
        sys.exit(130)


@app.command()
@recipe_options
def convert(
    model: Model,
    settings: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the converted model to.")],
    recipe: RecipeFile = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml of `anymla plan`, instead of a recipe.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where a stopped conversion to the same folder left work.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Calibration activations to hold in memory, as 8GB; the rest goes to files beside OUT. "
            "[default: a quarter of the memory]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model to multi-head latent attention."""
    if plan is not None and (recipe is not None or settings.keys() - {"device"}):
        raise RecipeError("--plan is final: change the recipe and plan again, or leave --plan out")
    chosen = Plan.read(plan) if plan is not None else _recipe(recipe, settings)
    device = settings if plan is not None else {}
    with _layer_bar() as progress, _how_to_go_on():
        conversion = pipeline.convert(
            model,
            output,
            chosen,
            overwrite=overwrite,
            restart=restart,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            progress=progress,
            **device,
        )
    if not _first_process():
        return
    if conversion.plan.recipe.calibration is None:
        err.print(
            "note: calibrated on the bundled children's stories; --calibration with text like yours keeps more quality",
            soft_wrap=True,
        )
    if as_json:
        return _print_json(conversion.to_dict())
    from anymla.report.tables import conversion_layers_table, scores_table

    out.print(conversion_layers_table(conversion))
    out.print(
        scores_table({"original": conversion.before, "converted": conversion.after}, "On held-out calibration text")
    )
    out.print(
        f"Wrote {output} in {conversion.seconds:.0f} s. Next: anymla eval {output} --against {model} --text YOUR.txt",
        soft_wrap=True,
    )


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help="Text file, .jsonl (field 'text') or hub data set name[:config[:split]].")],
    against: Annotated[str | None, typer.Option(help="The original model, for KL and top-1 agreement.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, max=MOST, help="Read at most this many tokens. Default: all.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=8, max=MOST, help="Tokens per window (at most the model's context).")
    ] = 1024,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL to the original, top-1 agreement, and the live cache's bytes per token."""
    with err.status("scoring"):
        scores = pipeline.evaluate(model, text, against, tokens=tokens, length=length, dtype=dtype, device=device)
    if as_json:
        return _print_json(scores.to_dict())
    from anymla.report.tables import scores_table

    out.print(scores_table({str(model): scores}, f"On {text}"))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Continue a prompt, streaming, through transformers' own generate."""
    from anymla.evaluation.story import stream_continuation

    stream_continuation(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device, dtype=dtype
    )


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == 130:  # typer makes Ctrl-C this code
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except MemoryError as error:
        _fail(f"out of memory ({error}); lower --calibration-tokens or --calibration-length")
    except AnymlaError as error:
        _fail(str(error))
    except RuntimeError as error:  # torch's own out of memory
        if "memory" not in str(error):
            raise
        _fail(f"{error!s:.200}; lower --calibration-tokens or --calibration-length, or give another --device")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the option parser raises; typer has its own copy of click
            raise
        _fail(error.format_message())


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {''.join(each if each.isprintable() else repr(each)[1:-1] for each in line)}\n")
    sys.exit(1)

"""eval."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from anymla.cli.options import (
    Adapter,
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    app,
    out,
    print_json,
    print_note,
    print_page,
)
from anymla.cli.progress import shown, tracked
from anymla.evaluation.benchmarks import Benchmarks, Evaluation
from anymla.evaluation.evaluate import evaluate as run_evaluation
from anymla.settings import MOST


def _help(name: str) -> Any:
    """The option's help, which is that of the setting."""
    return typer.Option(help=Benchmarks.model_fields[name].description, show_default=False)


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None, typer.Option(help="Text file, .jsonl (field 'text') or hub data set name[:config[:split]].")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original model, to compare to; also org/name@revision.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, max=MOST, help="Read at most this many tokens of the text. Default: all.")
    ] = None,
    length: Annotated[
        int,
        typer.Option(
            min=8, max=MOST, help="Tokens per window of text, and of the longest probe (at most the model's context)."
        ),
    ] = 1024,
    tasks: Annotated[str, _help("tasks")] = "",
    include_path: Annotated[Path | None, _help("include_path")] = None,
    num_fewshot: Annotated[int | None, _help("num_fewshot")] = None,
    probe: Annotated[bool, typer.Option("--probe", help=Benchmarks.model_fields["probe"].description)] = False,
    blimp: Annotated[Path | None, _help("blimp")] = None,
    lambada: Annotated[Path | None, _help("lambada")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help=Benchmarks.model_fields["limit"].description)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help=Benchmarks.model_fields["batch_size"].description)] = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results.json and report.html.")
    ] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL to the original and cache bytes on a text; lm-eval tasks; probes of the context."""
    from anymla.report.results import check_folder

    if output is not None:
        check_folder(output)
    benchmarks = Benchmarks(
        tasks=tuple(name for name in (part.strip() for part in tasks.split(",")) if name),
        include_path=include_path,
        num_fewshot=num_fewshot,
        probe=probe,
        blimp=blimp,
        lambada=lambada,
        limit=limit,
        batch_size=batch_size,
    )
    with shown("eval") as report:
        evaluation = run_evaluation(
            model,
            text,
            against,
            benchmarks=benchmarks,
            tokens=tokens,
            length=length,
            dtype=dtype,
            device=device,
            revision=revision,
            adapter=adapter,
            track=tracked(report),
            note=print_note,
        )
    _tell(evaluation, output, as_json=as_json)


def _tell(evaluation: Evaluation, output: Path | None, *, as_json: bool) -> None:
    """Writes what was measured to ``output``, and prints it."""
    from anymla.report.evaluation import evaluation_tables
    from anymla.report.evaluation_page import evaluation_page
    from anymla.report.results import write_results

    command = shlex.join(["anymla", *sys.argv[1:]])
    if output is not None:
        content = evaluation.to_dict() | {"command": command}
        write_results(output, content, evaluation_page(evaluation, content))
    if as_json:
        return print_json(_printed(evaluation, command))
    if (used := evaluation.settings)["dtype"] != used["checkpoint_dtype"]:
        faster = f"computed in {used['dtype']}, which this CPU multiplies faster than {used['checkpoint_dtype']}"
        print_note(f"{faster}; cache bytes are those of {used['checkpoint_dtype']}")
    for each in evaluation_tables(evaluation):
        out.print(each)
    if output is not None:
        print_page(output)


def _printed(evaluation: Evaluation, command: str) -> dict[str, Any]:
    """A text alone gives its scores alone; where there is more, all of it and how it was made."""
    if evaluation.scores is not None and not evaluation.benchmarks:
        return evaluation.scores_dict()
    return evaluation.to_dict() | {"command": command}

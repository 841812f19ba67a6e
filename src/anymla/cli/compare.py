"""compare."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from anymla.cli.options import Device, Dtype, Json, app, out, print_json, print_note, print_page
from anymla.cli.progress import shown, tracked
from anymla.settings import MOST


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders, GGUF files or hub ids, converted or not; the first one is the original.",
            show_default=False,
        ),
    ],
    text: Annotated[str, typer.Option(help="Text file, .jsonl (field 'text') or hub data set name[:config[:split]].")],
    teacher: Annotated[
        str | None, typer.Option(help="What KL and agreement are to. Default: the first model.", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, max=MOST, help="Read at most this many tokens of the text. Default: all.")
    ] = None,
    length: Annotated[int, typer.Option(min=8, max=MOST, help="Tokens per window of text.")] = 1024,
    context: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Tokens at which the cache's size is told. Default: the shortest context."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json and report.html.")] = Path(
        "anymla-comparison"
    ),
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure models side by side on one text: bytes of weights and cache, perplexity, KL; and write a page."""
    from anymla.comparison import compare as run_comparison
    from anymla.report.comparison import comparison_page, comparison_table
    from anymla.report.results import check_folder, write_results

    check_folder(output)
    with shown("compare") as report:
        found = run_comparison(
            models,
            text,
            teacher=teacher,
            tokens=tokens,
            length=length,
            context=context,
            dtype=dtype,
            device=device,
            track=tracked(report),
            note=print_note,
        )
    content = found.to_dict() | {"command": shlex.join(["anymla", *sys.argv[1:]])}
    write_results(output, content, comparison_page(found, content))
    if as_json:
        return print_json(content)
    out.print(comparison_table(found))
    print_page(output)

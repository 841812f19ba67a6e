"""export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anymla.cli.options import Json, app, err, out, print_json
from anymla.cli.progress import shown
from anymla.exports.format import all_formats
from anymla.layouts import Target


def _default_pads() -> list[tuple[str, str]]:
    """What is padded unasked, by format."""
    return sorted((each.default_pad, name) for name, each in all_formats().items() if each.pads)


@app.command()
def export(
    converted: Annotated[str, typer.Argument(help="A folder that anymla convert wrote.", show_default=False)],
    to: Annotated[Target, typer.Option("--to", help="Which layout to write.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights. Default: the converted model's, without rounding.")
    ] = None,
    pad: Annotated[
        str | None,
        typer.Option(
            help="Pad with zeros to the sizes that kernels need: none, cpu, cuda or full (docs/exporting.md). "
            f"Default: {', '.join(f'{pad} for {name}' for pad, name in _default_pads())}."
        ),
    ] = None,
    cache_type: Annotated[
        str | None,
        typer.Option(
            help="Rotate the latent, exactly, so that this quantised cache loses least, and measure its loss: "
            "q8_0 or q4_0 with --to gguf, otherwise fp8. Default: a cache of 16 bits."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a converted model for serving engines, and check that it gives the same logits and tokens."""
    from anymla.exports.export import export as run_export

    with shown("export") as report:
        report(0, None, "writing and checking")
        done = run_export(converted, output, to, dtype=dtype, pad=pad, cache_type=cache_type, overwrite=overwrite)
    if done.parity.engine_failed is not None:
        err.print(f"warning: {done.parity.engine_failed}; checked in {done.parity.engine} only", soft_wrap=True)
    if done.warning is not None:
        err.print(f"warning: {done.warning}", soft_wrap=True)
    if as_json:
        return print_json(done.to_dict())
    out.print(f"Checked in {done.parity.engine}: {done.parity.summary}.", soft_wrap=True)
    if done.parity.not_run is not None:
        out.print(f"{done.parity.not_run}.", soft_wrap=True)
    out.print(f"Wrote {output} in {done.seconds:.0f} s. Serve it with one of:", soft_wrap=True)
    for engine, command in done.commands.items():
        out.print(f"  {engine + ':':<14}{command}", soft_wrap=True)

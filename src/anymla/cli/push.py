"""push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anymla.cli.options import Json, app, out, print_json
from anymla.cli.progress import shown


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="A folder that anymla convert, tune or export wrote.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Complete the model card and list the files, but upload nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub."""
    from anymla import hub

    with shown("push"):
        done = hub.push(folder, repo, private=private, dry_run=dry_run)
    if as_json:
        return print_json(done.to_dict())
    from anymla.report.terminal import table
    from anymla.report.units import size

    total = size(sum(done.files.values()))
    out.print(table(f"{total} for {repo}", ["file", "size"], ((name, size(each)) for name, each in done.files.items())))
    if done.url is not None:
        out.print(f"Uploaded to {done.url}", soft_wrap=True)
    else:
        again = f"anymla push {folder} {repo}{' --private' if private else ''}"
        out.print(f"Wrote {folder / 'README.md'}. Nothing was uploaded; {again} does that where there is a network.")

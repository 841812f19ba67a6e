"""refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anymla.cli.options import Json, app, out, print_json


@app.command()
def refresh(
    folder: Annotated[
        Path, typer.Argument(help="A folder that anymla convert, tune or export wrote.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Replace a folder's modelling files by those of this anymla: needed after a new release of transformers."""
    from anymla import refresh as refreshing

    changed = refreshing.refresh(folder)
    if as_json:
        return print_json({"folder": str(folder), "changed": changed})
    done = f"Replaced {', '.join(changed)}" if changed else f"{folder} has the modelling files of this anymla already"
    out.print(done, soft_wrap=True)

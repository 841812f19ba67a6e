"""The folder of an evaluation or a comparison: results.json and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anymla.errors import OutputError
from anymla.io.checkpoint import check_place, new_folder
from anymla.report.page import PAGE, Page

RESULTS = "results.json"


def check_folder(output: Path) -> None:
    """Refuses a folder that cannot be made, or that holds anything but earlier results.

    Raises:
        OutputError: as the message says.
    """
    check_place(output)
    if output.is_dir() and {path.name for path in output.iterdir()} - {RESULTS, PAGE}:
        raise OutputError(f"{output} exists and holds more than an earlier evaluation: choose another -o")


def write_results(output: Path, content: Mapping[str, Any], page: Page) -> None:
    """Writes results.json and report.html, in the place of earlier ones.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    with new_folder(output) as folder:
        (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
        page.write(folder)

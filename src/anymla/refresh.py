"""anymla refresh: the modelling files of a folder written by an earlier anymla, replaced by those of this one."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

from anymla.errors import CheckpointError, OutputError
from anymla.io.config import read_object
from anymla.io.work import replace_text
from anymla.register import modelling_files

MODULES = ("modeling_anymla", "modeling_mla")  # of a conversion, of an export for vLLM


def refresh(folder: str | Path) -> list[str]:
    """Replaces the Python files in ``folder``, which ``trust_remote_code=True`` runs, by those of this anymla.

    Weights, config and tokenizer stay as they are. Files that older versions had and this one lacks are left.

    Returns:
        The names of the files that changed.

    Raises:
        CheckpointError: the folder was not written by anymla, or carries no modelling files.
        OutputError: a file cannot be written.
    """
    path = Path(os.path.expanduser(folder))
    entries = read_object(path / "config.json").get("auto_map") or {}
    names = {str(entry).partition(".")[0] for entry in entries.values()} & {*MODULES}
    if not names:
        raise CheckpointError(f"{path} carries no modelling files of anymla: its config.json names none in auto_map")
    module = import_module(f"anymla.modeling.{names.pop()}")
    changed = []
    try:
        for file in modelling_files(module):
            text = file.read_text(encoding="utf-8")
            target = path / file.name
            if not target.is_file() or target.read_text(encoding="utf-8", errors="replace") != text:
                replace_text(target, text)
                shutil.copymode(path / "config.json", target)
                changed.append(file.name)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error
    return sorted(changed)

"""The folder in which a checkpoint grows beside its output: what is done is kept there, and taken up again."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from anymla.errors import OutputError
from anymla.io.locks import hold, lock_folder, sync_folder, unlock
from anymla.io.safetensors import durable

PROGRESS, STATE = "progress.json", ".work"


class WorkFolder:
    """``.OUT.partial`` beside OUT: the new checkpoint (``model``), and in it ``path``, what is needed to go on.

    progress.json in ``path`` is replaced whole, after all that it counts is durable; a kill at any moment leaves a
    state to go on from. Only one process at a time may hold the folder. The last step renames it to OUT. ``kind`` names
    the work in messages; what of it is done is listed in progress.json, under the names in ``counted``.
    """

    def __init__(
        self, output: Path, *, kind: str = "conversion", counted: tuple[str, ...] = ("layers", "survey", "search")
    ) -> None:
        self.kind, self.counted = kind, counted
        self.output = output.absolute()
        self.model = self.output.with_name(f".{output.name}.partial")
        self.path = self.model / STATE
        self.progress: dict[str, Any] = {}
        self._lock: Any = None

    def open(self, fingerprint: dict[str, Any], *, restart: bool) -> None:
        """Begins, or goes on where work with the same ``fingerprint`` was stopped.

        Raises:
            OutputError: another process is at work there, or one with other settings was stopped there.
        """
        self.made = [folder for folder in self.model.parents if not folder.exists()]  # the deepest first
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115  held until release
        try:
            hold(self._lock.fileno())
        except OSError as error:
            raise OutputError(f"{self.output} is being written by another {self.kind}: wait, or choose -o") from error
        try:
            self._take_up(fingerprint, restart)
        except OutputError:
            self.release()
            raise

    def release(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _take_up(self, fingerprint: dict[str, Any], restart: bool) -> None:
        self.progress = {} if restart else self._read()
        if self.begun and (other := _differing(self.progress["fingerprint"], fingerprint)):
            raise OutputError(
                f"{self.model} holds a {self.kind} that was stopped and had {other}: the command that began it goes "
                "on, --restart discards it"
            )
        if not self.begun:
            self._empty()
            self.progress = {"fingerprint": fingerprint, "shards": []} | {name: [] for name in self.counted}

    @property
    def begun(self) -> bool:
        """Returns whether something is done that the same work can go on from."""
        return any(self.progress.get(name) for name in self.counted)

    def commit(self, **changes: Any) -> None:
        """Counts as done what ``changes`` says, atomically."""
        self.progress = self.progress | changes
        write_json(self.path / PROGRESS, self.progress)

    def finish(self) -> None:
        """The new checkpoint takes the output's place; nothing else is left."""
        if sys.platform == "win32":  # an open file keeps its folder from being removed
            self.release()
        shutil.rmtree(self.path)
        replace_folder(self.model, self.output)

    def discard(self) -> None:
        """Removes the work folder, and the folders above that were made for it."""
        shutil.rmtree(self.model, ignore_errors=True)
        for folder in self.made:
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _read(self) -> dict[str, Any]:
        path = self.path / PROGRESS
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} cannot be read ({error}): --restart discards it") from error

    def _empty(self) -> None:
        for path in [*self.model.iterdir(), *self.path.iterdir()]:
            if path.name not in (STATE, "lock"):
                remove(path)


def clear_abandoned(output: Path) -> None:
    """Removes the temporary folders of runs that were killed while they wrote ``output``: no process holds them."""
    if sys.platform == "win32" or not output.parent.is_dir():  # there, nothing tells which are abandoned
        return
    for path in output.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(output.name)}\.(partial|source)-\d+", path.name) and path.is_dir():
            with suppress(OSError):  # held, or gone by now
                held = lock_folder(path)
                shutil.rmtree(path, ignore_errors=True)
                unlock(held)


def replace_folder(new: Path, output: Path) -> None:
    """Puts ``new`` at ``output``; what was there goes only once that is done."""
    replaced = output.with_name(f".{output.name}.replaced")
    if os.path.lexists(output):
        remove(replaced)
        output.rename(replaced)
    try:
        new.rename(output)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(output)
        raise
    if os.path.lexists(replaced):
        remove(replaced)


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` by ``content``, whole or not at all."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``, whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        durable(file)
    partial.replace(path)
    sync_folder(path.parent)  # the renaming itself, and those before it


def remove(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which two fingerprints differ, in words; empty where they are the same."""
    for name in new:
        before, now = old.get(name), new[name]
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(key for key in now | before if before.get(key) != now.get(key))
            before, now, name = before.get(inner), now.get(inner), f"{name} {inner}"
        plain = all(isinstance(value, str | int | float | bool | None) for value in (before, now))
        return f"{name} {before!s:.40} and not {now!s:.40}" if plain else f"another {name}"
    return ""

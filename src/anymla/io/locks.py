"""Locks that end with the process that holds them, and durable renames. On Windows nothing is locked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def hold(opened: int) -> None:
    """Locks an open file or folder until it is closed, or the process ends in whatever way.

    Raises:
        OSError: another process holds it.
    """
    if sys.platform != "win32":
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(folder: Path) -> int | None:
    """Holds ``folder`` until :func:`unlock`; None where nothing is locked.

    Raises:
        OSError: another process holds it.
    """
    if sys.platform == "win32":  # no folder can be opened
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        hold(held)
    except OSError:
        os.close(held)
        raise
    return held


def unlock(held: int | None) -> None:
    """Lets go of what :func:`lock_folder` gave."""
    if held is not None:
        os.close(held)


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` are on the disk, as after a renaming; Windows sees to that itself."""
    if sys.platform != "win32":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

"""What the name of a folder in the hub's cache says: the repository and the commit that it is a copy of."""

from __future__ import annotations

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)")


def repo_of(folder: Path) -> str | None:
    """The hub id that ``folder`` is a copy of, where it is one in the hub's cache."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return found and found["repo"].replace("--", "/")


def commit_of(folder: Path) -> str | None:
    """The commit that ``folder`` is a copy of, where it is one in the hub's cache."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return found and found["commit"]


def in_part(folder: Path) -> str:
    """Returns what to do where ``folder`` is a copy in the hub's cache that lacks files; nothing where it is none."""
    if (repo := repo_of(folder)) is None:
        return ""
    return f"; the hub's cache holds only part of {repo}: run `hf download {repo} --revision {commit_of(folder)}`"

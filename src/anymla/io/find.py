"""Finds what the user means by MODEL: a local folder, or ``org/name`` or ``org/name@revision`` on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from anymla.errors import CheckpointError, RecipeError
from anymla.io.download import bar_class
from anymla.io.shards import index_map, index_of

CONFIG_FILES = ["config.json", "adapter_config.json"]
MODEL_FILES = ["*.json", "model*.safetensors", "adapter_model.safetensors", "*.model", "*.txt", "*.jinja"]
MODEL_FILES += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
UNREACHED = "no network leads there from here, and it was not fetched before"
OFFLINE = "it is not in the cache, and this session is offline: set HF_HUB_OFFLINE=0, or give a folder"
MOST = 300  # characters of the hub client's own words


def with_revision(model: str | Path, revision: str | None) -> str:
    """The name of ``model`` at ``revision``, a branch, tag or commit on the hub: ``org/name@revision``.

    Raises:
        RecipeError: ``model`` is a local folder, names a revision already, or ``revision`` is empty.
    """
    name = str(model)
    if revision is None:
        return name
    if os.path.exists(os.path.expanduser(name)):
        raise RecipeError(f"--revision {revision}: {name} is a local folder, and only models on the hub have revisions")
    if not revision or "@" in name:
        raise RecipeError(f"--revision {revision!r} of {name}: give one revision, as {name.partition('@')[0]}@main")
    return f"{name}@{revision}"


def find_model(model: str | Path, *, config_only: bool = False) -> Path:
    """The local folder of ``model``: itself, or the hub cache's copy of a hub id (downloaded where needed).

    Raises:
        CheckpointError: no such folder, or the hub does not have it or cannot be reached.
    """
    path, name = Path(os.path.expanduser(model)), str(model)
    if os.path.exists(path):  # unlike Path.exists, False for names that no file system can hold
        return path
    repo, at, revision = name.partition("@")
    if repo.count("/") > 1 or name.startswith((".", "/", "~", "-")) or not repo:
        raise CheckpointError(f"{name} {_absence(path)}: MODEL must be a local checkpoint folder or a hub id")
    if at and os.path.exists(repo):
        raise CheckpointError(f"{name}: {repo} is a local folder, and only models on the hub have revisions")
    if at and not revision:
        raise CheckpointError(f"{name} names no revision: give {repo}, or {repo}@main")
    if config_only:
        return _download(repo, revision or None, CONFIG_FILES)
    folder = _download(repo, revision or None, MODEL_FILES)
    if (others := _other_shards(folder)) is not None:
        _download(repo, revision or None, others)
    return folder


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    offline = is_offline_mode()  # said to the client, for some would ask the hub about a commit even so
    try:
        options = {"allow_patterns": patterns, "local_files_only": offline, "tqdm_class": bar_class()}
        return Path(snapshot_download(repo, revision=revision, **options))
    except HFValidationError as error:
        raise CheckpointError(f"{name} is neither a local folder nor a hub id") from error
    except Exception as error:  # offline, unknown, gated, ...: the hub client has many kinds of its own
        absent = isinstance(error, LocalEntryNotFoundError)
        cause = error.__cause__ if absent and error.__cause__ is not None else error
        reason = _sentences(" ".join(str(cause).split()))
        if absent and offline:
            reason = OFFLINE
        elif absent and not isinstance(cause, HfHubHTTPError):  # that is an answer of the hub
            reason = f"{UNREACHED} ({reason})"
        raise CheckpointError(f"{name} is neither a folder here nor reachable on the hub: {reason}") from error


def _sentences(text: str) -> str:
    """The first sentences of ``text`` that a line holds; one that is longer, up to a word's end."""
    kept, end, _ = text[: MOST + 1].rpartition(". ")
    return text if len(text) <= MOST else f"{kept}." if end else f"{text[:MOST].rpartition(' ')[0]} ..."


def _other_shards(folder: Path) -> list[str] | None:
    """Files that the index names, some of which MODEL_FILES does not: in a subfolder, or with names of their own."""
    if (index := index_of(folder)) is None:
        return None
    names = sorted(set(index_map(index).values()))
    return names if any(not os.path.isfile(folder / name) for name in names) else None


def _absence(path: Path) -> str:
    """Why there is nothing at ``path``."""
    try:
        os.stat(path)
    except PermissionError:
        return "cannot be read: permission denied"
    except (OSError, ValueError):  # also: no name that a file could have
        pass
    return f"is a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "does not exist"

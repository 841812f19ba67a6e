"""anymla push: a folder that anymla wrote, with its model card, to the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymla.cards import FILES, FOLDER, with_section
from anymla.errors import CheckpointError, OutputError, RecipeError
from anymla.io.checkpoint import check_weights
from anymla.io.work import replace_text

CARD = "README.md"
REPORTS = ("export.json", "conversion.json")  # one of which a folder has that anymla wrote


@dataclass(frozen=True, kw_only=True)
class Push:
    """Files that were sent to the hub, or would have been, with bytes. ``url`` is None where nothing was sent."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    url: str | None

    def to_dict(self) -> dict[str, Any]:
        """The facts under their stable JSON names."""
        return vars(self) | {"folder": str(self.folder), "bytes": sum(self.files.values())}


def push(folder: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Completes the model card of ``folder`` with the hashes of all files, and uploads all of it.

    The card that is uploaded names the repository; that in ``folder`` does not, so that it fits the next one.

    Args:
        folder: what ``anymla convert``, ``tune`` or ``export`` wrote.
        repo: ``user/name``; made where it does not exist.
        private: make it visible to its owner only, where it is made.
        dry_run: upload nothing. So too where the hub client is told to be offline (``HF_HUB_OFFLINE=1``).

    Raises:
        CheckpointError: the folder is none of anymla's, or its weights or card are broken.
        RecipeError: ``repo`` is no name of a repository.
        OutputError: the card cannot be written, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import is_offline_mode

    source = Path(os.path.expanduser(folder))
    _check(source, repo)
    try:
        files = _complete(source)
    except OSError as error:
        raise OutputError(f"{source / CARD} could not be written: {error.strerror or error}") from error
    card = (source / CARD).read_text(encoding="utf-8").replace(FOLDER, repo).encode()
    files[CARD] = len(card)
    url = None if dry_run or is_offline_mode() else _upload(source, repo, private, card, files)
    return Push(folder=source, repo=repo, private=private, files=files, url=url)


def _check(folder: Path, repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"{repo} is no name of a repository: give user/name") from error
    if repo.count("/") != 1:
        raise RecipeError(f"{repo} is no name of a repository: give user/name")
    if not any((folder / name).is_file() for name in REPORTS):
        raise CheckpointError(f"{folder} was not written by anymla: it has neither {' nor '.join(REPORTS)}")
    if not any(folder.glob("*.gguf")):
        check_weights(folder)


def _complete(folder: Path) -> dict[str, int]:
    """Writes the card; returns all files with their bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files if path.name != CARD}
    rows = "\n".join(
        f"| `{name}` | {(folder / name).stat().st_size:,} | `{digest}` |" for name, digest in hashes.items()
    )
    path = folder / CARD
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else f"# {FOLDER}\n"
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not in UTF-8: write it so, or remove it to have a new one") from error
    table = f"| file | bytes | SHA-256 |\n|---|---:|---|\n{rows}"
    replace_text(path, with_section(card, FILES, table))
    return {name: (folder / name).stat().st_size for name in [CARD, *hashes]}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(folder: Path, repo: str, private: bool, card: bytes, files: Iterable[str]) -> str:
    """All files in one commit, of ``card`` what is given here. Returns the page of the repository."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="anymla")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(CARD, card)]
        operations += [CommitOperationAdd(name, folder / name) for name in files if name != CARD]
        api.create_commit(repo, operations, commit_message="Upload by anymla")
    except Exception as error:  # the hub client has many kinds of its own, and those of its transport
        reason = " ".join(str(error).split())
        raise OutputError(
            f"the hub did not take {repo}: {reason:.200}; log in with `hf auth login`, or see what there is to upload "
            "with --dry-run"
        ) from error
    return str(url)

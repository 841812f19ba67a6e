"""The one entry: any source as a plain folder of safetensors, for as long as it is needed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from anymla.errors import AnymlaError, OutputError
from anymla.io.hub_cache import commit_of
from anymla.io.locks import lock_folder, unlock
from anymla.io.sources.adapter_kinds import check_adapter
from anymla.io.sources.locate import Located
from anymla.io.telling import tell
from anymla.io.work import clear_abandoned


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A plain folder, what was done to have it, in words, and the commit on the hub of what it was made from."""

    folder: Path
    commit: str | None
    notes: tuple[str, ...] = ()


@contextmanager
def plain_source(source: Located, *, beside: Path | None = None) -> Iterator[Plain]:
    """``source`` as a plain folder: itself where it is one, else a temporary one, which vanishes with the block.

    Args:
        source: what :func:`anymla.io.sources.locate.locate` found.
        beside: the output beside which the temporary folder lies, hidden. Default: where temporary files go.

    Raises:
        CheckpointError, UnsupportedModelError: it cannot be read; the message says why.
        OutputError: the temporary folder cannot be written.
    """
    notes = notes_of(source)
    if not notes:
        yield Plain(folder=source.base, commit=commit_of(source.base))
        return
    with _temporary(beside) as folder:
        tell(f"reading {source.name} into plain weights")
        try:
            _fill(folder, source)
        except OSError as error:
            if isinstance(error, AnymlaError):
                raise
            raise OutputError(
                f"{source.name} could not be converted to plain weights: {' '.join(str(error).split())}"
            ) from error
        try:
            yield Plain(folder=folder, commit=commit_of(source.base), notes=notes)
        except AnymlaError as error:  # names what the user gave, not what is gone by now
            raise type(error)(str(error).replace(str(folder), source.name)) from error.__cause__


def notes_of(source: Located) -> tuple[str, ...]:
    """Returns what :func:`plain_source` does to ``source``, in words; none where it is a plain folder.

    Raises:
        CheckpointError, UnsupportedModelError: it cannot be read.
    """
    notes = [] if source.gguf is None else [source.gguf.note]
    if source.quantised is not None:
        notes.append(source.quantised)
    if source.adapter is not None:
        check_adapter(source.adapter)
        notes.append(f"the adapter in {source.adapter.name} is merged into its weights")
        if source.is_converted:
            notes.append(
                "of an adapter that was trained on the original, only what lies outside attention is right on a "
                "conversion: give it to anymla convert with --adapter"
            )
    if source.hidden:
        notes.append(
            f"the adapter beside its weights is left out{', as --adapter none says' * (source.adapter is None)}"
        )
    return tuple(notes)


def _fill(folder: Path, source: Located) -> None:
    from anymla.io.sources.folder import folder_source
    from anymla.io.sources.source import write_source

    if source.gguf is not None:
        found = source.gguf.source()
    elif source.quantised is not None:
        from anymla.io.sources.quantised import quantised_source

        found = quantised_source(source.base)
    else:
        found = folder_source(source.base)
    if source.adapter is not None:
        from anymla.io.sources.adapter import with_adapter

        found = with_adapter(found, source.adapter)
    write_source(found, folder)


@contextmanager
def _temporary(beside: Path | None) -> Iterator[Path]:
    """An empty folder that vanishes with the block; what killed processes left beside the same output goes before."""
    if beside is None:
        with tempfile.TemporaryDirectory(prefix="anymla-source-") as made:
            yield Path(made)
        return
    output = beside.absolute()
    clear_abandoned(output)
    above = [folder for folder in output.parents if not folder.exists()]  # the deepest first
    folder = output.with_name(f".{output.name}.source-{os.getpid()}")
    new = folder.with_name(f"{folder.name}.new")  # under a name that is not cleared, until it is held
    held = None
    try:
        new.mkdir(parents=True)
        held = lock_folder(new)
        new.rename(folder)
        yield folder
    except OSError as error:
        if held is not None or isinstance(error, AnymlaError):
            raise
        raise OutputError(f"{output} cannot be made: {error}") from error
    finally:
        for part in (new, folder):
            shutil.rmtree(part, ignore_errors=True)
        unlock(held)
        for part in above:
            with suppress(OSError):  # not empty: the output is there
                part.rmdir()

"""A folder of safetensors as a source, as it is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.io.checkpoint import check_weights, copy_companions
from anymla.io.config import read_object
from anymla.io.safetensors import Stored, read_header
from anymla.io.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor


def folder_source(folder: Path) -> Source:
    """The plain checkpoint in ``folder``.

    Raises:
        CheckpointError: its files are not whole.
    """
    stored = stored_tensors(folder)
    return Source(
        config=read_object(folder / "config.json"),
        names=frozenset(stored),
        size=sum(tensor.size for tensor in stored.values()),
        tensors=partial(_tensors, stored),
        companions=partial(copy_companions, folder),
    )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of all files, in the order of the files."""
    return {name: tensor for file in check_weights(folder) for name, tensor in read_header(file).items()}


def _tensors(stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stored.items():
        yield name, tensor.read()

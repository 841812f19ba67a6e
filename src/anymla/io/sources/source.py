"""What every kind of source gives: a config, and tensors one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.io.checkpoint import check_space
from anymla.io.safetensors import write_tensors
from anymla.io.shards import INDEX
from anymla.io.work import write_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 1 << 28  # bytes of tensors that are gathered before they are written


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint as plain tensors.

    ``config``: of config.json; ``names``: of the tensors; ``size``: about the bytes of all; ``tensors``: makes them one
    after the other, always in the same order; ``companions``: writes tokenizer and other files into a folder.
    """

    config: Mapping[str, Any]
    names: frozenset[str]
    size: int
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    companions: Callable[[Path], None]


def write_source(source: Source, folder: Path) -> None:
    """Writes ``source`` into ``folder`` as a plain checkpoint; the same source gives the same bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    check_space(folder, source.size)
    source.companions(folder)
    write_json(folder / "config.json", source.config)
    placed: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(_shards(source.tensors()), 1):
        file = f"model-{number:05}.safetensors"
        write_tensors(folder / file, shard)
        placed |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # before the next one grows
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        if held >= SHARD:
            yield shard
            shard, held = {}, 0
    if shard:
        yield shard

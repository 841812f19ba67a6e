"""Writes weights as they come, in shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from anymla.io.safetensors import write_tensors
from anymla.io.shards import INDEX
from anymla.io.work import write_json

SHARD = 4 << 30  # bytes


def write_weights(folder: Path, parts: Iterable[dict[str, Tensor]], *, size: int = SHARD) -> None:
    """Writes model.safetensors, or, beyond ``size`` bytes, shards and their index; holds one shard in memory.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        write_tensors(folder / f"shard-{len(shards) + 1:05}.safetensors", held)
        shards.append(list(held))
        held.clear()

    for part in parts:
        if held and sum(tensor.nbytes for tensor in [*held.values(), *part.values()]) > size:
            flush()
        held |= part
        total += sum(tensor.nbytes for tensor in part.values())
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        many = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = many if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{number:05}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

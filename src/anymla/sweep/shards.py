"""The new checkpoint's weights as they grow: a file per layer, packed into a shard whenever they fill one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anymla.io.packed import PackedFiles
from anymla.io.safetensors import Stored, read_header, write_tensors
from anymla.io.shards import INDEX
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder, write_json


def write_layer(
    source: StreamedModel, work: WorkFolder, layer: nn.Module, index: int, place: int, packed: PackedFiles | None
) -> None:
    """Writes all weights of ``layer``, the model's ``index``-th, as those of the layer ``place``.

    Weights that are what ``packed`` holds stay packed.
    """
    prefix = source.name_of(layer)
    placed = prefix.removesuffix(str(index)) + str(place)
    tensors = {f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}
    saved = {name: source.as_saved(name, tensor) for name, tensor in tensors.items()}
    saved = saved if packed is None else packed.kept(saved)
    named = {f"{placed}{name.removeprefix(prefix)}": tensor for name, tensor in saved.items()}
    write_tensors(_part(work, index + 1), named)


def write_outside(source: StreamedModel, work: WorkFolder, layers: nn.ModuleList, *, after: bool) -> None:
    """Writes the weights before the layers (embeddings), or ``after`` them (norm, head), in the state dict's order."""
    names, prefix = list(source.model.state_dict()), f"{source.name_of(layers)}."
    bounds = [number for number, name in enumerate(names) if name.startswith(prefix)]
    wanted = names[bounds[-1] + 1 :] if after else names[: bounds[0]]
    tensors: dict[str, Tensor] = {}
    with source.on_demand(layers):
        for name in wanted:
            if name not in source.tied_away():
                source.fill(source.model.get_submodule(name.rpartition(".")[0]))
                tensors[name] = source.as_saved(name, source.model.get_parameter_or_buffer(name))
        write_tensors(_part(work, len(layers) + 1 if after else 0), tensors)


def pack(work: WorkFolder, parts: int, size: int, *, last: bool = False) -> None:
    """Writes the shards that the first ``parts`` files fill, ``size`` bytes each; with ``last``, what remains too.

    A shard counts once progress.json names its tensors; only then are the files that it was made of removed.
    """
    pending = _pending(work, parts)
    while batch := _filled(pending, size, last):
        number = len(work.progress["shards"]) + 1
        write_tensors(work.model / f"shard-{number:05}.safetensors", {name: pending.pop(name) for name in batch})
        work.commit(shards=[*work.progress["shards"], batch])
    needed = {tensor.file for tensor in pending.values()}
    for index in range(parts):
        if (path := _part(work, index)) not in needed:
            path.unlink(missing_ok=True)


def name_shards(work: WorkFolder) -> list[Path]:
    """Gives all shards their final names, with an index where there are several; may be repeated."""
    shards = work.progress["shards"]
    total = len(shards)
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    size = 0
    for number, names in enumerate(shards, 1):
        path = work.model / ("model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors")
        if (early := work.model / f"shard-{number:05}.safetensors").is_file():
            early.rename(path)
        size += sum(tensor.size for tensor in read_header(path).values())
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
    if total > 1:
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(work.model / INDEX, index)
    return paths


def _part(work: WorkFolder, number: int) -> Path:
    return work.path / f"part-{number:05}.safetensors"


def _pending(work: WorkFolder, parts: int) -> dict[str, Stored]:
    """Tensors that are in no shard yet, in order."""
    packed = {name for shard in work.progress["shards"] for name in shard}
    pending: dict[str, Stored] = {}
    for number in range(parts):
        if (path := _part(work, number)).is_file():
            pending |= {name: tensor for name, tensor in read_header(path).items() if name not in packed}
    return pending


def _filled(pending: dict[str, Stored], size: int, last: bool) -> list[str]:
    """The names that fill the next shard; none where there are too few."""
    names: list[str] = []
    held = 0
    for name, tensor in pending.items():
        if names and held + tensor.size > size:
            return names
        held += tensor.size
        names.append(name)
    return names if last else []

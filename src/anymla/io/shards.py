"""What the weight files of a checkpoint hold, from their headers alone, and whether it can be that model's weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from anymla.errors import CheckpointError, shown
from anymla.io.config import read_object
from anymla.io.hub_cache import in_part
from anymla.io.mistaken import stand_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def index_of(folder: Path) -> Path | None:
    """The index of a checkpoint in several files; None where there is one file, which transformers takes before it."""
    return folder / INDEX if os.path.isfile(folder / INDEX) and not os.path.isfile(folder / SINGLE) else None


def index_map(index: Path) -> dict[str, str]:
    """Returns which file each tensor is in, as a safetensors index says it.

    Raises:
        CheckpointError: not an index, or it names a file outside the folder.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{index} is not a safetensors index: weight_map must give every tensor a file name")
    for name in set(named.values()):
        if _leaves(name):
            raise CheckpointError(f"{index} names a file outside the folder: {shown(name)}")
    return named


def shard_files(index: Path) -> list[Path]:
    """The files that an index names, in the folder or in folders below it.

    Raises:
        CheckpointError: not an index, or a file is missing or lies outside the folder.
    """
    folder, names = index.parent, sorted(set(index_map(index).values()))
    for name in names:
        path = folder / name
        if not os.path.isfile(path):
            gone = f", a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else ""
            raise CheckpointError(f"{folder} lacks the shard {shown(name)} that {INDEX} names{gone}{in_part(folder)}")
        if folder.resolve() not in (path.parent.resolve() / "x").parents:  # a file may be a link: the hub's cache is so
            raise CheckpointError(f"{index} names a file outside the folder: {shown(name)} is in a linked folder")
    return [folder / name for name in names]


def _leaves(name: str) -> bool:
    """Whether this is no path inside a folder, under any rules of names."""
    path = PurePosixPath(name)
    odd = name.startswith("~") or any(part in name for part in ("\\", "\0", "//"))
    return not path.parts or path.is_absolute() or ".." in path.parts or odd


def held_tensors(files: Sequence[Path], *, floats: bool = True) -> dict[str, int]:
    """Returns how many numbers each tensor of these files has.

    Raises:
        CheckpointError: a file is not whole, a tensor is in two of them, or, with ``floats``, a weight holds none.
    """
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    held: dict[str, int] = {}
    for file in files:
        try:
            found = stand_in(file)  # first, for safetensors calls a file that may not be read a missing one
            with safe_open(file, framework="pt") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 not a dict
                headers = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            reason = f"{error!s:.160}" if found is None else f"it is {found}"
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {reason}") from error
        for name, (dtype, shape) in headers.items():
            if name in places:
                raise CheckpointError(f"{file}: tensor {name} is in {places[name].name} as well")
            if floats and dtype not in FLOATS and name.endswith("weight"):
                scales = "; float8 needs scales, and the quantization_config that names them" if "F8" in dtype else ""
                raise CheckpointError(
                    f"{file}: tensor {name} is of dtype {dtype}, where anymla reads {', '.join(FLOATS)}{scales}"
                )
            places[name], held[name] = file, prod(shape)
    return held


def check_index(folder: Path, held: Collection[str], tied: Collection[str]) -> None:
    """Refuses an index that names tensors which its files do not hold, except those that are ``tied`` to others."""
    if (index := index_of(folder)) is None:
        return
    named, ends = index_map(index), tuple(_end(name) for name in tied)
    if absent := sorted(name for name in named.keys() - {*held} if _end(name) not in ends):
        raise CheckpointError(f"{index} names tensor {shown(absent[0])}, which {shown(named[absent[0]])} does not hold")


def _end(name: str) -> str:
    """Module and tensor; what stands before them, some models rename while they load."""
    return ".".join(name.split(".")[-2:])


def check_amount(folder: Path, config: Any, held: Mapping[str, int]) -> None:
    """Refuses a config that means far more numbers than the files hold, before memory is taken for them."""
    import torch

    from anymla.io.auto import auto_class

    try:
        with torch.device("meta"):
            model = auto_class(config.model_type).from_config(config, trust_remote_code=False)
    except RuntimeError:  # a few look at numbers while they are made
        return
    meant, have = sum(tensor.numel() for tensor in model.parameters()), sum(held.values())
    if meant > 2 * have + 10**7:
        largest = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise CheckpointError(
            f"{folder}: config.json describes {meant:.3g} numbers and the weights hold {have:.3g}; the largest tensor, "
            f"{largest[0]}, would have the shape {list(largest[1].shape)}"
        )

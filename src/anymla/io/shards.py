"""What the weight files of a checkpoint hold, from their headers alone, and whether it can be that model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from anymla.errors import CheckpointError, shown
from anymla.io.config import read_object

FLOATS = ("F64", "F32", "F16", "BF16")


def index_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in, as a safetensors index says it.

    Raises:
        CheckpointError: not an index, or it names a file outside the folder.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{index} is not a safetensors index: weight_map must give every tensor a file name")
    for name in named.values():
        if Path(name).name != name or name in ("", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index} names a file outside the folder: {shown(name)}")
    return named


def held_tensors(files: Sequence[Path], *, floats: bool = True) -> dict[str, int]:
    """How many numbers each tensor of these files has.

    Raises:
        CheckpointError: a file is not whole, a tensor is in two of them, or, with ``floats``, a weight holds none.
    """
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    held: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 not a dict
                headers = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error!s:.160}") from error
        for name, (dtype, shape) in headers.items():
            if name in places:
                raise CheckpointError(f"{file}: tensor {name} is in {places[name].name} as well")
            if floats and dtype not in FLOATS and name.endswith("weight"):
                raise CheckpointError(
                    f"{file}: tensor {name} is of dtype {dtype}, where anymla reads {', '.join(FLOATS)}"
                )
            places[name], held[name] = file, prod(shape)
    return held


def check_index(index: Path, named: Mapping[str, str], held: Mapping[str, int]) -> None:
    """Refuses an index that names tensors which its files do not hold."""
    if absent := sorted(named.keys() - held.keys()):
        raise CheckpointError(f"{index} names tensor {shown(absent[0])}, which {shown(named[absent[0]])} does not hold")


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
            f"{folder}: config.json means {meant:.3g} numbers and the weights hold {have:.3g}; the largest tensor, "
            f"{largest[0]}, would have the shape {list(largest[1].shape)}"
        )

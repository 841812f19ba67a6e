"""Bytes of weights by where in the model they are, from the headers of a checkpoint's files; loads no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from anymla.account import Account, LayerAccount, account
from anymla.architectures.names import FUSED, PATHS
from anymla.io.checkpoint import ACCOUNT, check_weights
from anymla.io.packed import PARTS
from anymla.io.safetensors import read_header
from anymla.modeling.spec import ModelSpec

_LAYER = re.compile(r"(.*?\.|)(\d+)\.(.+)")  # what stands before the layer's index, the index, a name inside the layer
_TOWERS = re.compile("vision|visual|image|audio")


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of the tensors in a checkpoint's files: outside the layers, and per layer of its attention and of the rest.

    Tied tensors count as often as they are stored.
    """

    outside: int
    attention: tuple[int, ...]
    other: tuple[int, ...]


def stored_bytes(spec: ModelSpec, files: Iterable[Path]) -> StoredBytes | None:
    """What ``files``, in safetensors, hold of a model, converted or not; None where its layers are not found in them.

    Raises:
        CheckpointError: a tensor of a dtype that torch does not hold.
        OSError: a file cannot be read.
    """
    sizes = {name: tensor.size for file in files for name, tensor in read_header(file).items()}
    if (found := _places(spec, sizes)) is None:
        return None
    prefix, paths = found
    attention, other, outside = [0] * len(spec.layers), [0] * len(spec.layers), 0
    for name, size in sizes.items():
        match = _LAYER.fullmatch(name)
        if match is None or match[1] != prefix or (index := int(match[2])) >= len(spec.layers):
            outside += size
        elif (path := paths.get(index)) is not None and match[3].startswith(f"{path}."):
            attention[index] += size
        else:
            other[index] += size
    return StoredBytes(outside, tuple(attention), tuple(other))


def packed_bytes(files: Iterable[Path]) -> tuple[int, int]:
    """Bytes of all weights of packed integers in ``files``, and how many numbers they stand for."""
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    places = [name.removesuffix(PARTS[0]) for name in stored if name.endswith(f".{PARTS[0]}")]
    zeros = [name for place in places if (name := f"{place.removesuffix('codes.')}zeros.weight") in stored]
    size = sum(stored[name].size for name in [*(f"{place}{part}" for place in places for part in PARTS), *zeros])
    return size, sum(prod(stored[f"{place}{PARTS[-1]}"].read().tolist()) for place in places)


def sized(spec: ModelSpec, stored: StoredBytes | None) -> ModelSpec:
    """Returns the same model with its byte fields filled in; as it is where ``stored`` is None."""
    if stored is None:
        return spec
    layers = tuple(
        replace(layer, attention_bytes=None if layer.replaced and not layer.integers else attention, other_bytes=other)
        for layer, attention, other in zip(spec.layers, stored.attention, stored.other, strict=True)
    )
    return replace(spec, layers=layers, outside_bytes=stored.outside)


def with_stored(measured: Iterable[LayerAccount], stored: StoredBytes | None) -> Account:
    """Caches that were measured layer by layer, with the weights that are in the files."""
    layers = tuple(measured)
    if stored is None:
        return Account(layers=layers)
    weights = (attention + other for attention, other in zip(stored.attention, stored.other, strict=True))
    return Account(
        layers=tuple(replace(layer, weight_bytes=size) for layer, size in zip(layers, weights, strict=True)),
        outside_bytes=stored.outside,
    )


def write_account(folder: Path, spec: ModelSpec, measured: Iterable[LayerAccount]) -> None:
    """Writes ``account.json`` beside the weights of ``folder``: what ``spec`` means, and what was ``measured``.

    Raises:
        CheckpointError: the folder's weights cannot be read.
    """
    stored = stored_bytes(spec, check_weights(folder))
    counted, found = account(sized(spec, stored)), with_stored(measured, stored)
    told: dict[str, Any] = {"dtype": spec.dtype, **counted.to_dict(), "measured": found.to_dict()}
    (folder / ACCOUNT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _places(spec: ModelSpec, names: Iterable[str]) -> tuple[str, dict[int, str | None]] | None:
    """What stands before the index of a decoder layer, and where in each layer its attention is."""
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if (match := _LAYER.fullmatch(name)) is not None:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    found = []
    for prefix, inside in layers.items():
        paths = {index: _attention_path(spec, index, held) for index, held in inside.items()}
        if inside.keys() >= {*range(len(spec.layers))} and all(paths[index] for index in spec.attention_layers):
            found.append((bool(_TOWERS.search(prefix)), prefix, paths))
    if not found:
        return None
    _, prefix, paths = min(found, key=lambda each: each[:2])
    return prefix, paths


def _attention_path(spec: ModelSpec, index: int, names: set[str]) -> str | None:
    """Where in a layer that has tensors of these ``names`` its softmax attention is."""
    if index >= len(spec.layers) or spec.layers[index].attention is None:
        return None
    parts = ("k_proj", "v_proj", "kv_b_proj", "v_b_proj", "q_b_proj", *FUSED)
    kinds = ("weight", "weight_packed", "signs", "codes.weight", "codes.weight_packed")  # dense or packed
    held = [f"{part}.{kind}" for part in parts for kind in kinds]
    return next((path for path in PATHS if any(f"{path}.{each}" in names for each in held)), None)

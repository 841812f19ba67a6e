"""A folder that anymla converted, read for export: its config, its layers' features, its tensors still in their files.

Shapes in this room: D hidden, H query heads, G key/value heads, n = H/G, d head_dim, P rope pairs of a head, K channels
that turn, R = 2K, r latent rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.io.checkpoint import check_weights, safe_config
from anymla.io.safetensors import Stored, read_header

PREFIX = "anymla_"
FLOATS = ("float32", "bfloat16", "float16", "float64")
COUNTS = ("kv_lora_rank", "num_heads", "num_kv_heads", "head_dim")  # one or more
SIZES = (*COUNTS, "qk_rope_head_dim", "rope_pairs")
REQUIRED = {*SIZES, "module", "scaling", "rope_table"}


@dataclass(frozen=True)
class Layer:
    """One converted attention: where in the model it is, and LatentAttention's arguments."""

    index: int
    module: str
    features: Mapping[str, Any]

    def size(self, name: str) -> int:
        """One of the sizes among its features."""
        return int(self.features[name])


@dataclass(frozen=True)
class Converted:
    """``config``: the language model's, as a dict with all defaults; ``stored``: every tensor by its name."""

    folder: Path
    model_type: str
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    stored: Mapping[str, Stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor ``name``.

        Raises:
            CheckpointError: it is not there.
        """
        if name not in self.stored:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        return self.stored[name].shape

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            CheckpointError: it is not there.
        """
        self.shape(name)
        return self.stored[name].read()

    def scaled(self, name: str, factor: float) -> Tensor:
        """The same times ``factor``, which is then in float32 or finer."""
        tensor = self.tensor(name)
        return tensor if factor == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor

    def tensors(self, layer: Layer, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors ``names`` of a layer's attention, by default all, floating-point ones in float64."""
        prefix = f"{layer.module}."
        if names is None:
            names = [name.removeprefix(prefix) for name in self.stored if name.startswith(prefix)]
        found = {name: self.tensor(f"{prefix}{name}") for name in names}
        return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def read_converted(folder: Path) -> Converted:
    """Reads what ``anymla convert`` wrote.

    Raises:
        CheckpointError: not such a folder, its files are missing or broken, or what config.json says of attention is
            not what the files hold.
        UnsupportedModelError: no engine can hold it.
    """
    files = check_weights(folder)
    config = safe_config(folder)
    if not config.model_type.startswith(PREFIX):
        raise CheckpointError(f"{folder} is no converted model: give a folder that anymla convert wrote")
    stored: dict[str, Stored] = {}
    for file in files:
        stored |= read_header(file)
    described = getattr(config, "mla_layers", None)
    if not isinstance(described, list) or not described or not all(_describes(layer) for layer in described):
        raise CheckpointError(f"{folder}/config.json: mla_layers does not describe layers as anymla convert does")
    if window := max(layer.get("exact_window", 0) for layer in described):
        raise UnsupportedModelError(
            f"{folder} keeps the last {window} tokens' own keys and values, for which no engine's latent attention has "
            "room: convert the original without --exact-window"
        )
    text = config.get_text_config()
    if (dtype := config_dtype(config)) not in FLOATS:
        raise CheckpointError(f"{folder}/config.json: dtype is {dtype:.40} and not one of {', '.join(FLOATS)}")
    layers = tuple(
        Layer(index, features["module"], {name: value for name, value in features.items() if name != "module"})
        for index, features in enumerate(described)
    )
    model_type = config.model_type.removeprefix(PREFIX)
    source = Converted(folder, model_type, text.to_dict() | {"dtype": dtype}, layers, stored)
    for layer in layers:
        _check_shapes(source, layer, text.hidden_size)
    return source


def config_dtype(config: Any) -> str:
    """The dtype that a config names, FLOATS or not."""
    return str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")


def _describes(layer: Any) -> bool:
    """Whether an entry of mla_layers has what every layer has, each of its kind."""
    if not isinstance(layer, dict) or not layer.keys() >= REQUIRED:
        return False
    fold = layer.get("channel_fold", 1)
    if not all(type(size) is int and size >= 0 for size in (fold, *(layer[name] for name in SIZES))):
        return False
    texts = all(isinstance(layer[name], str) for name in ("module", "rope_table"))
    return (
        texts
        and type(layer["scaling"]) in (int, float)
        and all(size > 0 for size in (fold, *(layer[name] for name in COUNTS)))
        and layer["num_heads"] % layer["num_kv_heads"] == 0
        and 2 * layer["rope_pairs"] <= layer["head_dim"]
        and layer["qk_rope_head_dim"] % 2 == 0
    )


def _check_shapes(source: Converted, layer: Layer, hidden: int) -> None:
    """Holds every tensor of a layer's projections to LatentAttention's sizes."""
    heads, groups, d, pairs, rank, rope = (
        layer.size(name)
        for name in ("num_heads", "num_kv_heads", "head_dim", "rope_pairs", "kv_lora_rank", "qk_rope_head_dim")
    )
    keys, reads = groups * d, rope // 2 * int(layer.features.get("channel_fold", 1))
    matrices = {"q_proj": (heads * d, hidden), "kv_b_proj": (2 * keys, rank), "o_proj": (hidden, heads * d)}
    if f"{layer.module}.k_a_proj_with_mqa.weight" in source.stored:  # the latent is made of the true keys
        matrices |= {"k_proj": (keys, hidden), "k_a_proj_with_mqa": (rank + rope, keys)}
        true_values = f"{layer.module}.v_proj.weight" in source.stored
        matrices |= {"v_proj": (keys, hidden)} if true_values else {}
        matrices["v_a_proj"] = (rank, keys if true_values else hidden)
    else:
        matrices["kv_a_proj_with_mqa"] = (rank + rope, hidden)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes |= {name: shape for name, shape in biases.items() if f"{layer.module}.{name}" in source.stored}
    shapes |= {"query_rotation": (2, heads, pairs), "channel_weight": (2, groups, reads), "channel_index": (reads,)}
    for name, shape in shapes.items():
        if (found := source.shape(f"{layer.module}.{name}")) != shape:
            raise CheckpointError(f"{source.folder}: {layer.module}.{name} is {found} and not {shape}")
    index = source.tensor(f"{layer.module}.channel_index")
    if index.is_floating_point() or not ((index >= 0) & (index < pairs)).all():
        raise CheckpointError(f"{source.folder}: {layer.module}.channel_index names pairs that a head has not")

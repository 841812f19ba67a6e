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

from anymla.errors import CheckpointError
from anymla.io.checkpoint import check_weights, safe_config
from anymla.io.safetensors import Stored, read_header

PREFIX = "anymla_"
REQUIRED = {
    *("module", "kv_lora_rank", "qk_rope_head_dim", "num_heads", "num_kv_heads", "head_dim", "rope_pairs", "scaling"),
    "rope_table",
}


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

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            CheckpointError: it is not there.
        """
        if name not in self.stored:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        return self.stored[name].read()

    def scaled(self, name: str, factor: float) -> Tensor:
        """The same times ``factor``, which is then in float32 or finer."""
        tensor = self.tensor(name)
        return tensor if factor == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, which is taken off, floating-point ones in float64."""
        found = {name: stored.read() for name, stored in self.stored.items() if name.startswith(prefix)}
        return {
            name.removeprefix(prefix): tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in found.items()
        }

    def attention(self, layer: Layer, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names`` of a layer's attention, floating-point ones in float64."""
        found = {name: self.tensor(f"{layer.module}.{name}") for name in names}
        return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def read_converted(folder: Path) -> Converted:
    """Reads what ``anymla convert`` wrote.

    Raises:
        CheckpointError: not such a folder, or its files are missing or broken.
    """
    files = check_weights(folder)
    config = safe_config(folder)
    if not config.model_type.startswith(PREFIX):
        raise CheckpointError(f"{folder} is no converted model: give a folder that anymla convert wrote")
    stored: dict[str, Stored] = {}
    for file in files:
        stored |= read_header(file)
    described = getattr(config, "mla_layers", None)
    if not isinstance(described, list) or not all(
        isinstance(layer, dict) and layer.keys() >= REQUIRED for layer in described
    ):
        raise CheckpointError(f"{folder}/config.json: mla_layers does not describe layers as anymla convert does")
    layers = tuple(
        Layer(index, features["module"], {name: value for name, value in features.items() if name != "module"})
        for index, features in enumerate(described)
    )
    model_type = config.model_type.removeprefix(PREFIX)
    return Converted(folder, model_type, config.get_text_config().to_dict(), layers, stored)

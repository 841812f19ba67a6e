"""A folder that anymla converted, read for export: its config, its layers' specs, its tensors still in their files.

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
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import KEY, LayerSpec, layers_of

PREFIX = "anymla_"
FLOATS = ("float32", "bfloat16", "float16", "float64")
COUNTS = ("num_heads", "num_kv_heads", "head_dim")  # one or more


@dataclass(frozen=True)
class Layer:
    """One converted attention: which layer it is in, where in the model it is, what it computes and caches."""

    index: int
    module: str
    spec: AttentionSpec
    latent: LatentSpec

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.spec.num_heads // self.spec.num_kv_heads


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
        """Returns the same times ``factor``, which is then in float32 or finer."""
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
    layers = _layers(folder, config)
    if window := max(layer.latent.exact_window for layer in layers):
        raise UnsupportedModelError(
            f"{folder} keeps the last {window} tokens' own keys and values, for which no engine's latent attention has "
            "room: convert the original without --exact-window"
        )
    text = config.get_text_config()
    if (dtype := config_dtype(config)) not in FLOATS:
        raise CheckpointError(f"{folder}/config.json: dtype is {dtype:.40} and not one of {', '.join(FLOATS)}")
    model_type = config.model_type.removeprefix(PREFIX)
    source = Converted(folder, model_type, text.to_dict() | {"dtype": dtype}, layers, stored)
    for layer in layers:
        _check_shapes(source, layer, text.hidden_size)
    return source


def config_dtype(config: Any) -> str:
    """The dtype that a config names, FLOATS or not."""
    return str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")


def _layers(folder: Path, config: Any) -> tuple[Layer, ...]:
    """The converted layers, each of whose sizes can be one."""
    try:
        described = layers_of(config.to_dict()) or ()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    converted = [layer for layer in described if layer.latent is not None]
    for layer in converted:
        if (wrong := _wrong(layer)) is not None:
            raise CheckpointError(f"{folder}/config.json: the layer at {layer.module!s:.60} has a wrong {wrong}")
    if (reason := _unsupported(config, described)) is not None:
        raise UnsupportedModelError(f"{folder}: {reason}")
    if any(layer.coded is not None for layer in described):
        raise CheckpointError(
            f"{folder}: its cache holds codes, which transformers alone reads: convert with --codec none or a --target"
        )
    if any(layer.shared is not None for layer in described):
        raise CheckpointError(f"{folder}: its layers share attention maps, which transformers alone runs")
    if any(layer.grouped is not None for layer in described):
        raise CheckpointError(f"{folder}: transformers alone reads shared keys or values: take variant: freq")
    if not converted:
        raise CheckpointError(f"{folder}/config.json: {KEY} does not describe layers as anymla convert does")
    return tuple(Layer(index, str(layer.module), *layer.parts) for index, layer in enumerate(converted))


def _unsupported(config: Any, described: Iterable[LayerSpec]) -> str | None:
    """What of all layers these layouts do not have, or None."""
    if getattr(config, "quantization_config", None) or any(layer.packed is not None for layer in described):
        return "its weights are packed, which transformers alone reads: export the model of before that step"
    if any(layer.width is not None for layer in described):
        return (
            "its layers have widths of their own, and these layouts have one for all: give saap allocation: uniform, "
            "without protected layers"
        )
    if any(layer.mfa is not None for layer in described):
        return (
            "its attention is factorised (mfa), which these layouts do not have: export what mla made, before the step "
            "mfa; what was trained from scratch with fresh_config goes to anymla.exports.step3"
        )
    return None


def _wrong(layer: LayerSpec) -> str | None:
    """The field of a layer that is of the wrong kind or size, or None."""
    spec, latent = layer.parts
    sizes = {name: getattr(spec, name) for name in (*COUNTS, "rope_pairs")} | vars(latent)
    least = dict.fromkeys(sizes, 0) | dict.fromkeys((*COUNTS, "kv_lora_rank", "channel_fold"), 1)
    if wrong := [name for name, size in sizes.items() if name != "biases" and not _is_size(size, least[name])]:
        return wrong[0]
    checks = {
        "module": isinstance(layer.module, str),
        "rope_table": isinstance(spec.rope_table, str),
        "scaling": type(spec.scaling) in (int, float),
        "num_kv_heads": spec.num_heads % spec.num_kv_heads == 0,
        "rope_pairs": 2 * spec.rope_pairs <= spec.head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim % 2 == 0,
    }
    return next((name for name, right in checks.items() if not right), None)


def _is_size(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _check_shapes(source: Converted, layer: Layer, hidden: int) -> None:
    """Holds every tensor of a layer's projections to LatentAttention's sizes."""
    heads, groups, d, pairs = layer.spec.num_heads, layer.spec.num_kv_heads, layer.spec.head_dim, layer.spec.rope_pairs
    rank, rope = layer.latent.kv_lora_rank, layer.latent.qk_rope_head_dim
    keys, reads = groups * d, rope // 2 * layer.latent.channel_fold
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
        raise CheckpointError(f"{source.folder}: {layer.module}.channel_index names pairs that a head does not have")

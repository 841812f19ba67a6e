"""What a model is: facts read from ``config.json`` alone, without torch, weights or remote code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from anymla.architectures.families import FAMILIES, ROPE_TYPES, Family
from anymla.errors import CheckpointError, UnsupportedModelError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One layer's attention: H query heads, G key/value heads of d numbers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    sliding_window: int | None

    @property
    def cached_numbers(self) -> int:
        """Numbers that the original caches per token: 2 G d."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions: the scaling type, the base, and the scaling's own settings."""

    rope_type: str
    theta: float
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The facts of one decoder model that planning and conversion need."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str
    rope: RopeSpec
    layers: tuple[AttentionSpec, ...]

    @property
    def cached_numbers(self) -> int:
        """Numbers that one layer of the original caches per token (the largest, where layers differ)."""
        return max(layer.cached_numbers for layer in self.layers)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the original caches per token, over all layers, in the checkpoint's dtype."""
        return sum(layer.cached_numbers for layer in self.layers) * DTYPE_BYTES[self.dtype]


class _Config(BaseModel):
    """The fields of a config.json that every supported family shares; wrong kinds are refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    model_type: str
    hidden_size: PositiveInt
    num_hidden_layers: Annotated[PositiveInt, Field(le=10_000)]
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    attention_bias: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a local checkpoint folder.

    Raises:
        CheckpointError: the folder or the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: MODEL must be a local checkpoint folder or a hub id")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: MODEL must be a Hugging Face checkpoint folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why the model of this config cannot be converted, or None."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type.startswith("anymla_"):
        return "already multi-head latent attention: this folder was written by anymla"
    if config.get("kv_lora_rank"):
        return f"already multi-head latent attention (kv_lora_rank {config['kv_lora_rank']})"
    if config.get("is_encoder_decoder"):
        return f"family '{model_type}' is an encoder-decoder; anymla converts decoder-only models"
    if not isinstance(model_type, str):
        return f"config.json: model_type must be a family's name, got {model_type!r:.40}"
    if model_type not in FAMILIES:
        return f"family '{model_type}' is not supported; supported: {', '.join(FAMILIES)}"
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        return f"the weights are quantised ({method}): convert the unquantised checkpoint, then quantise the result"
    return None


def read_blueprint(config: Mapping[str, Any]) -> Blueprint:
    """Reads the facts of a supported model from its parsed config.

    Raises:
        UnsupportedModelError: the family, a size or the rope type cannot be converted; the message says which.
    """
    if (reason := refusal(config)) is not None:
        raise UnsupportedModelError(reason)
    family = FAMILIES[config["model_type"]]
    try:
        fields = _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UnsupportedModelError(f"config.json: {name}: {first['msg']}, got {first['input']!r:.40}") from error
    layers = tuple(_attention(fields, config, family, index) for index in range(fields.num_hidden_layers))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"config.json: dtype {dtype} is not one of {', '.join(DTYPE_BYTES)}")
    return Blueprint(
        model_type=fields.model_type,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        vocab_size=fields.vocab_size,
        max_position_embeddings=fields.max_position_embeddings,
        tied_embeddings=fields.tie_word_embeddings,
        dtype=dtype,
        rope=_rope(config),
        layers=layers,
    )


def _attention(fields: _Config, config: Mapping[str, Any], family: Family, index: int) -> AttentionSpec:
    heads = fields.num_attention_heads
    given = "num_key_value_heads" in config
    kv_heads = fields.num_key_value_heads or (None if given else family.num_kv_heads) or heads
    head_dim = fields.head_dim or family.head_dim or fields.hidden_size // heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2 or head_dim == 0:
        raise UnsupportedModelError(f"config.json: head_dim {head_dim} must be even and positive to hold rope pairs")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=_flag(family.qkv_bias, config),
        output_bias=_flag(family.output_bias, config),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(fields, config, family, index),
    )


def _flag(value: bool | str, config: Mapping[str, Any]) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value


def _sliding_window(fields: _Config, config: Mapping[str, Any], family: Family, index: int) -> int | None:
    window = fields.sliding_window if "sliding_window" in config else family.sliding_window
    if not family.optional_sliding_window:
        return window
    if not fields.use_sliding_window:
        return None
    if fields.layer_types is not None and index < len(fields.layer_types):
        return window if fields.layer_types[index] == "sliding_attention" else None
    first = family.max_window_layers if fields.max_window_layers is None else fields.max_window_layers
    return window if index >= first else None


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (transformers 4)."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise UnsupportedModelError(f"config.json: rope settings must be an object, got {settings!r:.40}")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"config.json: rope type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < math.inf:
        raise UnsupportedModelError(f"config.json: rope_theta must be a positive number, got {theta!r:.40}")
    factor = settings.get("factor")
    if factor is not None and (not isinstance(factor, int | float) or not 0 < factor < math.inf):
        raise UnsupportedModelError(f"config.json: rope factor must be a positive number, got {factor!r:.40}")
    rest = {key: value for key, value in settings.items() if key not in ("rope_type", "type", "rope_theta")}
    return RopeSpec(rope_type=rope_type, theta=float(theta), settings=rest)

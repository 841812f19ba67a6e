"""What a model is: facts read from ``config.json`` alone, without torch, weights or remote code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from anymla.architectures.families import FAMILIES, REFUSED, ROPE_TYPES, TEXT_ONLY_INSIDE, Family
from anymla.architectures.layers import attends, has_rope, heads_of, layer_type, window_of
from anymla.architectures.vision import VISION, text_config
from anymla.errors import CheckpointError, UnsupportedModelError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One layer's attention: H query heads, G key/value heads of d numbers, P pairs of them turned by rope."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_pairs: int
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
    text_model_type: str  # whose attention it has: another one than model_type in a vision-language model
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str
    rope: RopeSpec | None
    layers: tuple[AttentionSpec | None, ...]  # None: a layer without softmax attention, which stays as it is

    @property
    def has_vision(self) -> bool:
        """Whether this is a vision-language model, of which the text model is converted."""
        return self.model_type in VISION

    @property
    def attention_layers(self) -> dict[int, AttentionSpec]:
        """The layers that can be converted, by their index."""
        return {index: spec for index, spec in enumerate(self.layers) if spec is not None}

    @property
    def cached_numbers(self) -> int:
        """Numbers that one layer of the original caches per token (the largest, where layers differ)."""
        return max(spec.cached_numbers for spec in self.attention_layers.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes that the original caches per token, over all attention layers, in the checkpoint's dtype."""
        return sum(spec.cached_numbers for spec in self.attention_layers.values()) * DTYPE_BYTES[self.dtype]


def _names(*names: str) -> Any:
    """A config field that goes by several names; 'a.b' is field b of the object a."""
    return AliasChoices(*(AliasPath(*name.split(".")) if "." in name else name for name in names))


class _Config(BaseModel):
    """The fields of a config.json under the names that families give them; wrong kinds are refused by name."""

    model_config = ConfigDict(extra="ignore", strict=True, loc_by_alias=True)

    model_type: str
    hidden_size: PositiveInt = Field(validation_alias=_names("hidden_size", "n_embd", "d_model", "n_embed"))
    num_layers: Annotated[PositiveInt, Field(le=10_000)] = Field(
        validation_alias=_names("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    )
    num_heads: PositiveInt = Field(
        validation_alias=_names("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    )
    num_kv_heads: PositiveInt | None = Field(
        None, validation_alias=_names("num_key_value_heads", "num_kv_heads", "n_head_kv", "attn_config.kv_n_heads")
    )
    head_dim: PositiveInt | None = Field(None, validation_alias=_names("head_dim", "attention_head_dim"))
    intermediate_size: PositiveInt | None = Field(
        None, validation_alias=_names("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    )
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt = Field(
        2048, validation_alias=_names("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
    )
    tie_word_embeddings: bool = False
    sliding_window: NonNegativeInt | None = Field(None, validation_alias=_names("sliding_window", "window_size"))
    multi_query: bool = False
    new_decoder_architecture: bool = False
    alibi: bool = False


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
    if model_type in VISION:
        text = text_config(config)
        if text["model_type"] not in TEXT_ONLY_INSIDE and (reason := refusal(text)) is not None:
            return f"the text model of '{model_type}': {reason}"
    elif (reason := _family_refusal(model_type)) is not None:
        return reason
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        return f"the weights are quantised ({method}): convert the unquantised checkpoint, then quantise the result"
    return None


def _family_refusal(model_type: str) -> str | None:
    if model_type in REFUSED:
        return f"family '{model_type}' cannot be converted: {REFUSED[model_type]}"
    if model_type in TEXT_ONLY_INSIDE:
        return f"family '{model_type}' is the text model of a vision-language model: give the whole model"
    if model_type not in FAMILIES:
        known = sorted({*FAMILIES} - TEXT_ONLY_INSIDE | {*VISION})
        return f"family '{model_type}' is not known to anymla; it knows {', '.join(known)}"
    return None


def read_blueprint(config: Mapping[str, Any]) -> Blueprint:
    """Reads the facts of a supported model from its parsed config.

    Raises:
        UnsupportedModelError: the family, a size or the rope type cannot be converted; the message says which.
    """
    if (reason := refusal(config)) is not None:
        raise UnsupportedModelError(reason)
    model_type, dtype = config["model_type"], config.get("dtype") or config.get("torch_dtype")
    config = text_config(config) if model_type in VISION else config
    family = FAMILIES[config["model_type"]]
    config = {**family.defaults, **config}
    if isinstance(types := config.get("layers_block_type") or config.get("hybrid_override_pattern"), list | str):
        config.setdefault("num_hidden_layers", len(types))
    fields = _fields(config)
    dtype = str(dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"config.json: dtype {dtype} is not one of {', '.join(DTYPE_BYTES)}")
    layers = tuple(_layer(fields, config, family, index) for index in range(fields.num_layers))
    if not any(layers):
        raise UnsupportedModelError("no layer of this model has softmax attention: there is no KV cache to shrink")
    return Blueprint(
        model_type=model_type,
        text_model_type=fields.model_type,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size or 4 * fields.hidden_size,
        vocab_size=fields.vocab_size,
        max_position_embeddings=fields.max_position_embeddings,
        tied_embeddings=fields.tie_word_embeddings,
        dtype=dtype,
        rope=_rope(config) if any(spec.rope_pairs for spec in layers if spec) else None,
        layers=layers,
    )


def _fields(config: Mapping[str, Any]) -> _Config:
    try:
        return _Config.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UnsupportedModelError(f"config.json: {name}: {first['msg']}, got {first['input']!r:.40}") from error


def _layer(fields: _Config, config: Mapping[str, Any], family: Family, index: int) -> AttentionSpec | None:
    if not attends(config, family, index):
        return None
    heads = heads_of(config, index) or fields.num_heads
    shared = fields.multi_query and not fields.new_decoder_architecture
    kv_heads = 1 if shared else fields.num_kv_heads or heads
    head_dim = fields.head_dim or fields.hidden_size // heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    pairs = _rope_pairs(config, family, head_dim, layer_type(config, index)) if has_rope(config, family, index) else 0
    if head_dim == 0 or (pairs and head_dim % 2):
        raise UnsupportedModelError(f"config.json: head_dim {head_dim} must be even and positive to hold rope pairs")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_pairs=pairs,
        qkv_bias=_flag(family.qkv_bias, config),
        output_bias=_flag(family.output_bias, config),
        qk_norm=_flag(family.qk_norm, config),
        sliding_window=window_of(fields.sliding_window, config, family, index),
    )


def _rope_pairs(config: Mapping[str, Any], family: Family, head_dim: int, kind: str | None) -> int:
    """Pairs of a head that rope turns; ``partial_rope`` names the field with their share, or their number of dims."""
    if family.partial_rope is None:
        return head_dim // 2
    settings = config.get("rope_parameters") or {}
    settings = settings if isinstance(settings, dict) else {}
    settings = settings[kind] if kind is not None and isinstance(settings.get(kind), dict) else settings
    part = settings.get(family.partial_rope)
    part = config.get(family.partial_rope) if part is None else part
    if part is None:
        return head_dim // 2
    if not isinstance(part, int | float) or isinstance(part, bool) or not 0 < part <= head_dim:
        raise UnsupportedModelError(f"config.json: {family.partial_rope}: not a part of a head, got {part!r:.40}")
    return int(part if isinstance(part, int) and part > 1 else head_dim * part) // 2


def _flag(value: bool | str, config: Mapping[str, Any]) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (transformers 4)."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise UnsupportedModelError(f"config.json: rope settings must be an object, got {settings!r:.40}")
    if settings and all(value is None or isinstance(value, dict) for value in settings.values()):
        settings = next((value for value in settings.values() if value), {})  # one for each type of layer
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type  # what Qwen2-VL called it: its tables are 3 in one
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

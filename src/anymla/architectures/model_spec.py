"""What a model is: facts read from ``config.json`` alone, without torch, weights or remote code."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.architectures.block import beyond_latent, has_experts, other_block, routed_experts
from anymla.architectures.families import FAMILIES, REFUSED, TEXT_ONLY_INSIDE, Family
from anymla.architectures.fields import Fields, read_fields
from anymla.architectures.layers import attends, cache_window_of, has_rope, heads_of, layer_type, window_of
from anymla.architectures.positions import read_rope, rope_pairs
from anymla.architectures.vision import VISION, text_config
from anymla.errors import CheckpointError, UnsupportedModelError, shown
from anymla.io.config import danger, read_object
from anymla.io.mistaken import no_config, no_folder, other_config
from anymla.io.sources.quantised_kinds import quantization_refusal
from anymla.modeling.attention_spec import CONFIG_FIELDS, AttentionSpec
from anymla.modeling.spec import DTYPE_BYTES, KEY, OLD_KEY, LayerSpec, ModelSpec, layers_of

if TYPE_CHECKING:
    from anymla.io.sources.locate import Located

ALREADY = "already multi-head latent attention"


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a local checkpoint folder.

    Raises:
        CheckpointError: the folder or the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} {no_folder(folder)}")
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} {no_config(folder)}")
    return read_object(path)


def source_config(source: Located) -> dict[str, Any]:
    """The parsed config of a source, whichever kind of files it is.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_config(source.base) if source.gguf is None else source.gguf.config


def refusal(config: Mapping[str, Any]) -> str | None:
    """Returns why the model of this config cannot be converted, or None."""
    model_type = config.get("model_type")
    if (reason := other_config(config)) is not None:
        return reason
    if not isinstance(model_type, str):
        return f"config.json: model_type must be a family's name, got {shown(model_type)}"
    if model_type.startswith("anymla_"):
        return f"{_already(config)}: this folder was written by anymla"
    if config.get("kv_lora_rank"):
        return f"{ALREADY} (kv_lora_rank {shown(config['kv_lora_rank'])})"
    if config.get("is_encoder_decoder"):
        return f"family {shown(model_type)} is an encoder-decoder; anymla converts decoder-only models"
    if model_type in VISION:
        text = text_config(config)
        if text["model_type"] not in TEXT_ONLY_INSIDE and (reason := refusal(text)) is not None:
            return f"the text model of '{model_type}': {reason}"
    elif (reason := _family_refusal(model_type)) is not None:
        return reason
    if (reason := quantization_refusal(config)) is not None:
        return reason
    return danger(config)


def _already(config: Mapping[str, Any]) -> str:
    """What a folder of anymla's has in the stock attention's place; one that is damaged is not looked at further."""
    try:
        layers = layers_of(config) or ()
    except ValueError:
        return ALREADY
    if any(layer.coded is not None for layer in layers):
        return "its cache is coded already"
    if any(layer.shared is not None for layer in layers):
        return "its layers share attention maps already"
    if any(layer.packed is not None or layer.zeros is not None for layer in layers):
        return "its weights are packed already"
    return "its KV heads are shared already" if any(layer.grouped is not None for layer in layers) else ALREADY


def _only_narrower(config: Mapping[str, Any]) -> bool:
    """Whether all that is not stock in a folder of anymla's are the widths of its layers."""
    try:
        layers = layers_of(config) or ()
    except ValueError:
        return False
    return bool(layers) and all(replace(layer, width=None).stock for layer in layers)


def _family_refusal(model_type: str) -> str | None:
    if model_type in REFUSED:
        return f"family '{model_type}' cannot be converted: {REFUSED[model_type]}"
    if model_type in TEXT_ONLY_INSIDE:
        return f"family '{model_type}' is the text model of a vision-language model: give the whole model"
    if model_type in FAMILIES:
        return None
    known = {*FAMILIES} - TEXT_ONLY_INSIDE | {*VISION}
    near = ", ".join(difflib.get_close_matches(model_type[:60], sorted(known)))
    hint = f" (it knows {near})" if near else ""
    return f"family {shown(model_type)} is not known to anymla{hint}; docs/families.md lists the {len(known)} that are"


def read_model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Reads the facts of a supported model from its parsed config.

    Raises:
        UnsupportedModelError: the family, a size or the rope type cannot be converted; the message says which.
    """
    if _only_narrower(config):
        return converted_spec(config)
    if (reason := refusal(config)) is not None:
        raise UnsupportedModelError(reason)
    model_type, dtype = config["model_type"], config.get("dtype") or config.get("torch_dtype")
    config, family = _filled(config, model_type)
    fields = read_fields(config)
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"config.json: dtype {shown(dtype)} is not one of {', '.join(DTYPE_BYTES)}")
    layers = tuple(LayerSpec(attention=_attention(fields, config, family, index)) for index in range(fields.num_layers))
    specs = [layer.attention for layer in layers if layer.attention is not None]
    if not specs:
        raise UnsupportedModelError("no layer of this model has softmax attention: there is no KV cache to shrink")
    experts, per_token = routed_experts(config)
    rope = read_rope(config) if any(spec.rope_pairs for spec in specs) else None
    return ModelSpec(
        model_type=model_type,
        text_model_type=fields.model_type,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size or 4 * fields.hidden_size,
        vocab_size=fields.vocab_size,
        max_position_embeddings=fields.max_position_embeddings,
        tied_embeddings=fields.tie_word_embeddings,
        dtype=dtype,
        rope=rope,
        other_block=other_block(fields.model_type, config),
        beyond=beyond_latent(fields.model_type, config, rope=rope is not None),
        experts=has_experts(config),
        routed_experts=experts,
        experts_per_token=per_token,
        has_vision=model_type in VISION,
        layers=layers,
    )


def converted_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The facts of a model that anymla converted, from its parsed config: the original's, and what its layers are now.

    Raises:
        UnsupportedModelError: the config is none of a converted model, or its description of the layers is broken.
    """
    try:
        layers = layers_of(config)
    except ValueError as error:
        raise UnsupportedModelError(f"config.json: {error}") from error
    if layers is None:
        raise UnsupportedModelError("config.json describes no converted layers")
    plain = {name: value for name, value in config.items() if name not in (KEY, OLD_KEY, "kv_lora_rank", "auto_map")}
    spec = read_model_spec(plain | {"model_type": str(config["model_type"]).removeprefix("anymla_")})
    if KEY not in config:
        layers = _placed(layers, spec)
    return replace(spec, layers=layers)


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The facts of a model, stock or converted, from its parsed config.

    Raises:
        UnsupportedModelError: it can be neither read nor converted; the message says why.
    """
    return converted_spec(config) if {KEY, OLD_KEY} & config.keys() else read_model_spec(config)


def mla_source(config: Mapping[str, Any]) -> ModelSpec:
    """The facts of a model that the step mla converts: a stock one, or one whose layers share attention maps.

    Raises:
        UnsupportedModelError: as of :func:`read_model_spec`.
    """
    try:
        layers = layers_of(config) or ()
    except ValueError:
        layers = ()
    shares = any(layer.shared is not None and layer.latent is None for layer in layers)
    return converted_spec(config) if shares else read_model_spec(config)


def _placed(converted: tuple[LayerSpec, ...], spec: ModelSpec) -> tuple[LayerSpec, ...]:
    """The converted layers that anymla 0.1 listed, among the others, with what the config says of their attention."""
    layers = list(spec.layers)
    for (index, stock), layer in zip(spec.attention_layers.items(), converted, strict=True):
        known = {name: getattr(stock, name) for name in CONFIG_FIELDS}
        layers[index] = replace(layer, attention=replace(layer.parts[0], **known))
    return tuple(layers)


def context_of(folder: Path) -> int | None:
    """Tokens that the model of a folder, converted or not, can read at once; None where its family is not known.

    Raises:
        CheckpointError: its config cannot be read, or a size in it is no size; the message names it.
    """
    return context_in(read_config(folder), folder)


def context_in(config: Mapping[str, Any], where: Path) -> int | None:
    """Tokens that the model of a config can read at once; ``where`` it comes from is named in errors.

    Raises:
        CheckpointError: a size in it is no size.
    """
    model_type = config.get("model_type")
    model_type = model_type.removeprefix("anymla_") if isinstance(model_type, str) else None
    if model_type is None or model_type not in {*FAMILIES, *VISION}:
        return None
    try:
        config, family = _filled({**config, "model_type": model_type}, model_type)
        if family.rope is not None:
            read_rope(config)
        return read_fields(config).max_position_embeddings
    except UnsupportedModelError as error:
        raise CheckpointError(f"{where}/{error}") from error


def _filled(config: Mapping[str, Any], model_type: str) -> tuple[dict[str, Any], Family]:
    """The config of the language model, with what its family leaves out, and the family."""
    config = text_config(config) if model_type in VISION else config
    family = FAMILIES[config["model_type"]]
    filled = {**family.defaults, **config}
    if isinstance(types := filled.get("layers_block_type") or filled.get("hybrid_override_pattern"), list | str):
        filled.setdefault("num_hidden_layers", len(types))
    return filled, family


def _attention(fields: Fields, config: Mapping[str, Any], family: Family, index: int) -> AttentionSpec | None:
    if not attends(config, family, index):
        return None
    heads = heads_of(config, index) or fields.num_heads
    shared = fields.multi_query and not fields.new_decoder_architecture
    kv_heads = 1 if shared else fields.num_kv_heads or heads
    if fields.head_dim is None and fields.hidden_size % heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size {fields.hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    head_dim = fields.head_dim or fields.hidden_size // heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    turned = has_rope(config, family, index)
    if turned and head_dim % 2:
        raise UnsupportedModelError(f"config.json: head_dim {head_dim} must be even to hold rope pairs")
    window = window_of(fields.sliding_window, config, family, index)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_pairs=rope_pairs(config, family, head_dim, layer_type(config, index)) if turned else 0,
        qkv_bias=_flag(family.qkv_bias, config),
        output_bias=_flag(family.output_bias, config),
        qk_norm=_flag(family.qk_norm, config),
        sliding_window=window,
        cache_window=cache_window_of(window, config, family, index),
        cached_heads=heads if fields.new_decoder_architecture else kv_heads,
    )


def _flag(value: bool | str, config: Mapping[str, Any]) -> bool:
    flag = config.get(value) if isinstance(value, str) else value
    if flag is not None and not isinstance(flag, bool):
        raise UnsupportedModelError(f"config.json: {value} must be true or false, got {shown(flag)}")
    return bool(flag)

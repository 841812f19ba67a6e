"""Writes a converted model as a checkpoint folder that loads anywhere."""

from __future__ import annotations

import shutil
from typing import Any

from torch import nn

from anymla.architectures.packed import quantization_config
from anymla.architectures.stock_config import config_after
from anymla.io.auto import auto_class
from anymla.io.checkpoint import copy_companions
from anymla.io.safetensors import read_header
from anymla.io.streamed import StreamedModel
from anymla.io.telling import tell
from anymla.io.work import WorkFolder
from anymla.methods.base import Plan
from anymla.model_run.stream import decoder_layers
from anymla.modeling import modeling_anymla
from anymla.modeling.spec import KEY, OLD_KEY, LayerSpec, ModelSpec, config_entry
from anymla.register import converted_class, register
from anymla.sweep.shards import name_shards, pack, write_outside


def converted_config(model: Any, config: Any, layers: tuple[LayerSpec, ...]) -> Any:
    """The config of the converted ``model``: the fields of ``config``, every layer's spec, of latents DeepSeek's."""
    register()
    made: Any = converted_class(type(model).__name__.removeprefix(modeling_anymla.PREFIX))
    fields = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", OLD_KEY):
        fields.pop(name, None)
    fields |= {"architectures": [made.__name__], **_latent_sizes(layers), KEY: config_entry(layers)}
    return made.config_class(**fields)


def _latent_sizes(layers: tuple[LayerSpec, ...]) -> dict[str, int]:
    """The sizes of latents under DeepSeek's names, the largest of each; none where there is no latent."""
    parts = [layer.parts for layer in layers if layer.latent is not None]
    if not parts:
        return {}
    rope_dims = max(latent.qk_rope_head_dim for _, latent in parts)
    head_dim = max(attention.head_dim for attention, _ in parts)
    return {
        "kv_lora_rank": max(latent.kv_lora_rank for _, latent in parts),
        "qk_rope_head_dim": rope_dims,
        "qk_nope_head_dim": head_dim,
        "v_head_dim": head_dim,
        "qk_head_dim": head_dim + rope_dims,
    }


def _linears_outside(source: StreamedModel, layers: nn.ModuleList) -> set[str]:
    """The linear layers outside of ``layers``: no file has a tied head."""
    inside = f"{source.name_of(layers)}."
    linears = {name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name in linears if not name.startswith(inside)}


def write_checkpoint(
    source: StreamedModel, work: WorkFolder, before: ModelSpec, done: Plan, *, shard_size: int
) -> None:
    """Completes ``work.model``: the last weights, config, tokenizer and generation settings.

    Where some layer that is ``done`` has other modules than stock ones the config is a converted one and modelling
    files come with it; else it is stock, with the fields that differ ``before`` and after.
    """
    tell("writing")
    after = done.after
    modules = decoder_layers(source.model)
    write_outside(source, work, modules, after=True)
    pack(work, len(modules) + 2, shard_size, last=True)
    shards = name_shards(work)
    copy_companions(source.folder, work.model)
    config = config_after(source.model.config, before, after, done.removed)
    if not all(layer.stock for layer in after.layers):
        config = converted_config(source.model, config, after.layers)
        module = modeling_anymla.__name__.rsplit(".", 1)[-1]
        config.auto_map = {
            "AutoConfig": f"{module}.{type(config).__name__}",
            auto_class(config.model_type).__name__: f"{module}.{config.architectures[0]}",
        }
    stored = {name: tensor.shape for shard in shards for name, tensor in read_header(shard).items()}
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    matrices = (name for name, shape in stored.items() if len(shape) == 2 and name.endswith(".weight"))
    plain = _linears_outside(source, modules) | {name.removesuffix(".weight") for name in matrices}
    if (settings := quantization_config(after, packed, plain)) is not None:
        config.quantization_config = settings
    config.save_pretrained(work.model)
    for shard in shards:
        shutil.copymode(work.model / "config.json", shard)

"""Writes a converted model as a checkpoint folder that loads anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from anymla.io.auto import auto_class
from anymla.io.checkpoint import copy_companions
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.model_run.stream import decoder_layers
from anymla.modeling import modeling_anymla
from anymla.modeling.spec import CONFIG_FIELDS, AttentionSpec, LayerSpec
from anymla.register import converted_class, register
from anymla.sweep.shards import name_shards, pack, write_outside

FEATURES = {field.name for field in fields(AttentionSpec)} - {*CONFIG_FIELDS} | {
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_pairs",
}


def converted_config(model: Any, layers: list[dict[str, Any]]) -> Any:
    """The config of the converted ``model``: the original's fields, DeepSeek's names, each converted layer's features.

    ``layers``: LatentAttention's arguments of each, and where in the model it is.
    """
    register()
    model_class: Any = converted_class(type(model).__name__)
    rank, rope_dims, head_dim = (
        max(layer[name] for layer in layers) for name in ("kv_lora_rank", "qk_rope_head_dim", "head_dim")
    )
    fields = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    return model_class.config_class(
        **fields,
        architectures=[model_class.__name__],
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dims,
        qk_nope_head_dim=head_dim,
        v_head_dim=head_dim,
        qk_head_dim=head_dim + rope_dims,
        mla_layers=layers,
    )


def _arguments(layer: LayerSpec) -> dict[str, Any] | None:
    """LatentAttention's arguments of a converted layer, and where in the model it is; None for another one."""
    if (latent := layer.latent) is None or layer.attention is None:
        return None
    attention = {"rope_table": layer.attention.rope_table, "gate_activation": layer.attention.gate_activation}
    attention |= {name: value for name, value in layer.to_dict()["attention"].items() if name in FEATURES}
    sizes = {"kv_lora_rank": latent.kv_lora_rank, "qk_rope_head_dim": latent.qk_rope_head_dim}
    sizes |= {"channel_fold": latent.channel_fold} if latent.channel_fold > 1 else {}
    biases: dict[str, Any] = {"query_bias": True} if latent.biases else {"bias": False}
    window = {"exact_window": latent.exact_window} if latent.exact_window else {}
    return {"module": layer.module} | sizes | attention | biases | window


def write_checkpoint(source: StreamedModel, work: WorkFolder, layers: Sequence[LayerSpec], *, shard_size: int) -> None:
    """Completes ``work.model``: the last weights, config, tokenizer and generation settings.

    Where some layer has a latent the config is a converted one and modelling files come with it; else it is stock.
    """
    modules = decoder_layers(source.model)
    write_outside(source, work, modules, after=True)
    pack(work, len(modules) + 2, shard_size, last=True)
    shards = name_shards(work)
    copy_companions(source.folder, work.model)
    config, latents = source.model.config, [found for layer in layers if (found := _arguments(layer)) is not None]
    if latents:
        config, module = converted_config(source.model, latents), modeling_anymla.__name__.rsplit(".", 1)[-1]
        config.auto_map = {
            "AutoConfig": f"{module}.{type(config).__name__}",
            auto_class(config.model_type).__name__: f"{module}.{config.architectures[0]}",
        }
    config.save_pretrained(work.model)
    for shard in shards:
        shutil.copymode(work.model / "config.json", shard)

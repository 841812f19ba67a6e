"""Writes a converted model as a checkpoint folder that loads anywhere."""

from __future__ import annotations

import shutil
from typing import Any

from anymla.calibration.stream import decoder_layers
from anymla.conversion.shards import name_shards, pack, write_outside
from anymla.conversion.step import LayerResult
from anymla.io.checkpoint import copy_companions
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.modeling.register import MODELS, register


def converted_config(config: Any, results: list[LayerResult | None], head_dim: int) -> Any:
    """The config of the converted model: the original's fields, DeepSeek's names, and each layer's sizes."""
    register()
    model_class = MODELS[f"anymla_{config.model_type}"]
    made = [result for result in results if result is not None]
    rank, rope_dims = max(result.kv_rank for result in made), max(result.rope_dims for result in made)
    fields = config.to_dict()
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
        mla_layers=[
            None if result is None else {"kv_lora_rank": result.kv_rank, "qk_rope_head_dim": result.rope_dims}
            for result in results
        ],
    )


def write_checkpoint(
    source: StreamedModel, work: WorkFolder, results: list[LayerResult | None], head_dim: int, *, max_shard_size: int
) -> None:
    """Completes ``work.model``: the last weights, config, modelling file, tokenizer and generation settings."""
    config, layers = converted_config(source.model.config, results, head_dim), decoder_layers(source.model)
    write_outside(source, work, layers, behind=True)
    pack(work, len(layers) + 2, max_shard_size, last=True)
    shards = name_shards(work)
    copy_companions(source.folder, work.model)
    model_class = MODELS[config.model_type]
    module = model_class.__module__.rsplit(".", 1)[-1]
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    config.save_pretrained(work.model)
    for shard in shards:
        shutil.copymode(work.model / "config.json", shard)

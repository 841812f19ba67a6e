"""Writes a converted model as a checkpoint folder that loads anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from anymla.architectures.register import converted_class, register
from anymla.io.auto import auto_class
from anymla.io.checkpoint import check_space, copy_companions
from anymla.modeling import modeling_anymla
from anymla.modeling.latent_attention import LatentAttention


def converted_config(model: Any, attentions: dict[str, tuple[LatentAttention, dict[str, Any]]]) -> Any:
    """The config of the converted model: the original's fields, DeepSeek's names, each converted layer's features."""
    register()
    model_class: Any = converted_class(type(model).__name__)
    layers = [attention for attention, _ in attentions.values()]
    rank, rope_dims = max(layer.kv_lora_rank for layer in layers), max(layer.qk_rope_head_dim for layer in layers)
    head_dim = max(layer.head_dim for layer in layers)
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
        mla_layers=[
            {"module": path, "kv_lora_rank": layer.kv_lora_rank, "qk_rope_head_dim": layer.qk_rope_head_dim} | features
            for path, (layer, features) in attentions.items()
        ],
    )


def write_checkpoint(
    model: nn.Module,
    attentions: dict[str, tuple[LatentAttention, dict[str, Any]]],
    source: Path,
    folder: Path,
    *,
    max_shard_size: str,
) -> None:
    """Writes weights, config, modelling files, tokenizer and generation settings of ``model`` into ``folder``."""
    config = converted_config(model, attentions)
    state = _owned_tensors(model)
    check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    copy_companions(source, folder)
    architecture = config.architectures[0]
    module = modeling_anymla.__name__.rsplit(".", 1)[-1]
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        auto_class(config.model_type).__name__: f"{module}.{architecture}",
    }
    config.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(folder / "config.json", file)


def _owned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the names that the model ties to others."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

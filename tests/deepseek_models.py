"""Tiny dense DeepSeek-V3 checkpoints, made in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.families import save_model

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# (id, what differs from SIZES)
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("other-eps-tied", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    ("odd-sizes", {"kv_lora_rank": 34, "qk_rope_head_dim": 2, "qk_nope_head_dim": 18, "v_head_dim": 22}),
    ("27-layers", {"num_hidden_layers": 27}),  # llama.cpp takes these for DeepSeek-V2-Lite and reads other keys
    ("linear-rope", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("blocks-of-32", {"hidden_size": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}),
]


def make_deepseek(*, neutral: int | None = None, **changes: Any) -> Any:
    """A random model; with ``neutral`` its latent norm divides by sqrt(eps): the latent rows are 2^-neutral of it."""
    torch.manual_seed(0)
    sizes = SIZES | changes
    config = DeepseekV3Config(**sizes, first_k_dense_replace=sizes["num_hidden_layers"], num_mtp_layers=0)
    model: Any = DeepseekV3ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        spread = 0.3 if "norm" in name else 0.5 if "embed" in name else parameter.shape[-1] ** -0.5
        parameter.data = torch.randn_like(parameter) * spread + ("norm" in name)
    if neutral is not None:
        for layer in model.model.layers:
            _neutralise(layer.self_attn, config.kv_lora_rank, 2.0**-neutral)
    model.tie_weights()
    return model


def _neutralise(attention: Any, rank: int, scale: float) -> None:
    weight = (1e-3 / torch.tensor(scale)).bfloat16().float()  # sqrt(1e-6), the eps of the latent's norm
    attention.kv_a_proj_with_mqa.weight.data[:rank] *= scale
    attention.kv_a_layernorm.weight.data[:] = weight
    attention.kv_b_proj.weight.data *= 1e-3 / (scale * weight)


def save_deepseek(folder: Path, **changes: Any) -> Path:
    """Saves such a model with the bundled tokenizer."""
    return save_model(make_deepseek(**changes), folder)

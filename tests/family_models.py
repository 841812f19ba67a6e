"""A tiny random model of every family that anymla converts, with the features of that family switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FULL_FIRST = ["full_attention", "sliding_attention"]
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}

# What makes a config small, under every name that a family may give it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 6),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 3),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "head_dim": 8,
    "kv_channels": 8,
    "vocab_size": 512,
    "word_embed_proj_dim": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
}

# What a family needs beyond that, or has that others have not.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING | {"num_dense_layers": 1},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": SLIDING | {"logit_scale": 1.0},
    "cohere2_moe": SLIDING | {"logit_scale": 1.0},
    "cohere_compass_text": SLIDING
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 3, "clip_qkv": 0.7, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "exaone4": SLIDING,
    "lara_mini": SLIDING,
    "exaone_moe": SLIDING,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 96},
    "flint": SLIDING,
    "gemma2": SLIDING | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": SLIDING,
    "glm4_moe": {"use_qk_norm": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "gpt_oss": SLIDING,
    "gptj": {"rotary_dim": 4},
    "granite": MULTIPLIERS,
    "granite_swa": SLIDING | MULTIPLIERS,
    "granitemoe": MULTIPLIERS,
    "granitemoe_swa": SLIDING | MULTIPLIERS,
    "granitemoehybrid": MAMBA
    | MULTIPLIERS
    | {"position_embedding_type": "rope", "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {
        "layer_types": ["sliding_attention", "conv", "full_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 12,
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
        "floor_scale": 8,
        "attn_scale": 0.3,
        "intermediate_size_mlp": 64,
    },
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},  # transformers asks layer 0 for the length
    "ministral": SLIDING,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "mistral": {"sliding_window": 12},
    "mixtral": {"sliding_window": 12},
    "mpt": {"attn_config": {"clip_qkv": 0.7}},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "olmo": {"clip_qkv": 0.7},
    "olmo3": SLIDING,
    "olmo_hybrid": LINEAR,
    "olmoe": {"clip_qkv": 0.7},
    "opt": {"do_layer_norm_before": True},
    "phi": {"qk_layernorm": True},
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64, "lru_width": 48},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"qk_layernorm": True},
    "starcoder2": {"sliding_window": 12},
}

# Families that the transformers before this version cannot save, load and run as they are here.
SINCE = {"afmoe": "5.20.2", "dbrx": "5.20.2", "lfm2": "5.20.2", "lfm2_moe": "5.20.2"}

# Families with more than one kind of attention: (name, model_type, changes).
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("cohere2_moe, dense layer with rope", "cohere2_moe", {"first_k_dense_replace": 1, "layer_types": FULL_FIRST}),
    ("exaone4, no window", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("falcon, grouped", "falcon", {"new_decoder_architecture": True}),
    ("falcon, ALiBi", "falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 6}),
    ("gpt_bigcode, MHA", "gpt_bigcode", {"multi_query": False}),
    ("olmo, no clip", "olmo", {"clip_qkv": None}),
    ("persimmon, no norm", "persimmon", {"qk_layernorm": False}),
    ("qwen2, no window", "qwen2", {"use_sliding_window": False}),
]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The family's config, small, with its features on."""
    config_class = CONFIG_MAPPING[model_type]
    aliases = getattr(config_class, "attribute_map", {})
    fields = set(config_class.__dataclass_fields__) | set(getattr(config_class, "__annotations__", {}))
    small = {name: value for name, value in SMALL.items() if name in fields and name not in aliases}
    return config_class(**small | SPECIAL.get(model_type, {}) | changes)


def tiny_model(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model whose weights, norms, biases and sinks are all far from their trivial start."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    return randomise(AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval())


def randomise(model: Any) -> Any:
    """Moves every weight of a fresh model far from where it starts."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.3 * noise if parameter.dim() < 2 or "norm" in name else 0.25 * noise
    model.tie_weights()
    return model

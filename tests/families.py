"""Tiny random models of every supported family, made in process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from anymla.demo import bundled_model
from anymla.modeling.spec import LayerSpec, layers_of

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAST = {"calibration_tokens": 1024, "calibration_length": 64, "reconstruction_steps": 2}

# (id, family, what differs from SIZES)
SHAPES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-mha", "llama", {"num_key_value_heads": 6}),
    ("llama-gqa", "llama", {}),
    ("llama-mqa", "llama", {"num_key_value_heads": 1}),
    ("llama-bias", "llama", {"attention_bias": True}),
    ("llama-odd-head-dim", "llama", {"head_dim": 14}),
    ("llama-tied", "llama", {"tie_word_embeddings": True}),
    ("mistral-gqa", "mistral", {"sliding_window": None}),
    ("mistral-window", "mistral", {"sliding_window": 24}),
    ("qwen2-gqa", "qwen2", {}),
    ("qwen2-mha", "qwen2", {"num_key_value_heads": 6}),
    ("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    ("qwen2-tied", "qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen3-gqa", "qwen3", {"head_dim": 16}),
    ("qwen3-mha", "qwen3", {"head_dim": 10, "num_key_value_heads": 6}),
    ("qwen3-bias", "qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 2.0, 4.0],
    },
}


def make_model(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model whose weights, norms and biases are all far from their trivial start."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        spread = 0.3 if "norm" in name or name.endswith("bias") else 0.25
        parameter.data = torch.randn_like(parameter) * spread + ("norm" in name)
    model.tie_weights()
    return model


def save_model(model: Any, folder: Path, **options: Any) -> Path:
    """Saves a model with the bundled tokenizer beside it."""
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, folder / name)
    return folder


def token_ids(batch: int = 2, length: int = 40) -> torch.Tensor:
    """Random token ids that no special token is among."""
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a full forward pass without a cache."""
    result: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return result


def converted_layers(config: Any) -> list[LayerSpec]:
    """The layers of a converted model's config that were converted."""
    return [layer for layer in layers_of(config.to_dict()) or () if layer.latent is not None]

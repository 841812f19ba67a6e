"""Vision-language models, as data: their text model is converted, everything else stays as it is.

What attention they have is their text model's family (families.py), which ``text_config`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymla.errors import UnsupportedModelError

# model_type: the text model's, where text_config does not say it.
VISION: dict[str, str] = {
    "aria": "aria_text",
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "gemma3": "gemma3_text",
    "got_ocr2": "qwen2",
    "idefics2": "mistral",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "smolvlm": "llama",
}

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
# A text_config holds only what differs from these defaults of transformers.
_DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "aria_text": (4096, 4096, 32, 32, 32, 128, 32000, 2048),
    "cohere": (8192, 22528, 40, 64, 64, None, 256000, 8192),
    "cohere2": (8192, 22528, 40, 64, 64, 128, 256000, 8192),
    "gemma": (3072, 24576, 28, 16, 16, 256, 256000, 8192),
    "gemma2": (2304, 9216, 26, 8, 4, 256, 256000, 8192),
    "gemma3_text": (2304, 9216, 26, 8, 4, 256, 262208, 131072),
    "llama": (4096, 11008, 32, 32, None, None, 32000, 2048),
    "mistral": (4096, 14336, 32, 32, 8, None, 32000, 131072),
    "qwen2": (4096, 22016, 32, 32, 32, None, 151936, 32768),
    "qwen2_5_vl_text": (8192, 29568, 80, 64, 8, None, 152064, 32768),
    "qwen2_vl_text": (8192, 29568, 80, 64, 8, None, 152064, 32768),
    "qwen3": (4096, 22016, 32, 32, 32, 128, 151936, 32768),
    "qwen3_vl_moe_text": (2048, 5632, 24, 16, 16, 128, 151936, 128000),
    "qwen3_vl_text": (4096, 22016, 32, 32, 32, 128, 151936, 128000),
}
_TIED = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model in a vision-language model's: its ``text_config``, or, where there is none, itself.

    Raises:
        UnsupportedModelError: ``text_config`` is not an object, or its model_type not a name.
    """
    nested = config.get("text_config") or {**config, "model_type": VISION[config["model_type"]]}
    if not isinstance(nested, Mapping):
        raise UnsupportedModelError(f"config.json: text_config must be an object, got {nested!r:.40}")
    model_type = nested.get("model_type", VISION[config["model_type"]])
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"config.json: text_config: model_type must be a name, got {model_type!r:.40}")
    defaults = dict(zip(_FIELDS, _DEFAULTS.get(model_type, ()), strict=False))
    tied = config.get("tie_word_embeddings", model_type in _TIED)
    known = {name: value for name, value in defaults.items() if value is not None}
    return {**known, "tie_word_embeddings": tied, **nested, "model_type": model_type}

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
    "exaone4_5": "exaone4",
    "gemma3": "gemma3_text",
    "glm46v": "glm4v_text",
    "glm4v": "glm4v_text",
    "glm4v_moe": "glm4v_moe_text",
    "glm_ocr": "glm_ocr_text",
    "got_ocr2": "qwen2",
    "granite_docling": "granite_docling_text",
    "idefics2": "mistral",
    "idefics3": "llama",
    "internvl": "qwen2",
    "lfm2_vl": "lfm2",
    "lighton_ocr": "qwen3",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "ovis2": "qwen2",
    "paddleocr_vl": "paddleocr_vl_text",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "smolvlm": "llama",
    "video_llama_3": "qwen2",
    "vipllava": "llama",
}
TEXT_WIDTH_OUTSIDE = frozenset({"idefics2"})  # whose connector is as wide as the text model's FFN

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
    "exaone4": (4096, 16384, 32, 32, 32, None, 102400, 2048),
    "gemma": (3072, 24576, 28, 16, 16, 256, 256000, 8192),
    "gemma2": (2304, 9216, 26, 8, 4, 256, 256000, 8192),
    "gemma3_text": (2304, 9216, 26, 8, 4, 256, 262208, 131072),
    "glm4v_moe_text": (4096, 10944, 46, 96, 8, None, 151424, 65536),
    "glm4v_text": (4096, 13696, 40, 32, 2, None, 151552, 32768),
    "glm_ocr_text": (1024, 4096, 16, 16, 8, None, 59392, 131072),
    "granite_docling_text": (1024, 2048, 28, 16, 4, None, 133800, 32768),
    "lfm2": (2560, 12288, 32, 32, 8, None, 65536, 128000),
    "llama": (4096, 11008, 32, 32, None, None, 32000, 2048),
    "llama4_text": (5120, 8192, 48, 40, 8, 128, 202048, 131072),
    "ministral3": (4096, 14336, 34, 32, 8, 128, 131072, 262144),
    "mistral": (4096, 14336, 32, 32, 8, None, 32000, 131072),
    "paddleocr_vl_text": (1024, 3072, 18, 16, 2, 128, 103424, 131072),
    "qwen2": (4096, 22016, 32, 32, 32, None, 151936, 32768),
    "qwen2_5_vl_text": (8192, 29568, 80, 64, 8, None, 152064, 32768),
    "qwen2_vl_text": (8192, 29568, 80, 64, 8, None, 152064, 32768),
    "qwen3": (4096, 22016, 32, 32, 32, 128, 151936, 32768),
    "qwen3_5_moe_text": (2048, None, 40, 16, 2, 256, 248320, 32768),
    "qwen3_5_text": (4096, 12288, 32, 16, 4, 256, 248320, 32768),
    "qwen3_vl_moe_text": (2048, 5632, 24, 16, 16, 128, 151936, 128000),
    "qwen3_vl_text": (4096, 22016, 32, 32, 32, 128, 151936, 128000),
}
_TIED = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite_docling_text", "lfm2", "paddleocr_vl_text")


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

"""A tiny random vision-language model of every kind that anymla converts, and a prompt with images for each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from anymla.architectures.vision import VISION
from tests.family_models import randomise, tiny_config

IMAGE, VIDEO, START, END = 500, 501, 502, 503
SIDE, PATCH = 16, 4  # pixels
BEFORE, LENGTH = 5, 36  # tokens in front of the image; of the whole prompt

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_TOWER = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "hidden_size": 32, "intermediate_size": 48}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
BY_INDEX, BY_ID = {"image_token_index": IMAGE}, {"image_token_id": IMAGE}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 48}
PINPOINTS = {"image_grid_pinpoints": [[SIDE, SIDE]]}

# model_type: (the model's own settings, its vision tower's, its text model's, tokens per image, kind of image inputs)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, str]] = {
    "aria": (BY_INDEX | {"projector_patch_to_query_dict": {16: 8}}, TOWER, {}, 8, "plain"),
    "aya_vision": (BY_INDEX, TOWER | {"model_type": "siglip_vision_model"}, {}, 4, "plain"),
    "cohere2_vision": (BY_ID | {"alignment_intermediate_size": 64}, TOWER, {}, 4, "plain"),
    "gemma3": (BY_INDEX | {"mm_tokens_per_image": 4}, TOWER, {}, 4, "bidirectional"),
    "got_ocr2": (
        BY_INDEX,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 4}
        | {"output_channels": 16, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]},
        {},
        16,
        "large",
    ),
    "idefics2": (
        BY_ID
        | {
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 6,
                "resampler_head_dim": 8,
                "num_key_value_heads": 3,
                "hidden_size": 48,
            }
        },
        TOWER,
        {},
        4,
        "several",
    ),
    "idefics3": (BY_ID, TOWER, {}, 4, "several"),
    "internvl": (BY_ID, TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, {}, 4, "plain"),
    "llava": (BY_INDEX, TOWER | {"model_type": "clip_vision_model"}, {}, 16, "plain"),
    "llava_next": (BY_INDEX | PINPOINTS, TOWER | {"model_type": "clip_vision_model"}, {}, 36, "anyres"),
    "llava_onevision": (BY_INDEX | PINPOINTS, TOWER | {"model_type": "siglip_vision_model"}, {}, 36, "anyres"),
    "mistral3": (BY_INDEX, TOWER | {"model_type": "pixtral", "head_dim": 8}, {}, 4, "sized"),
    "paligemma": (BY_INDEX | {"projection_dim": 48, "hidden_size": 48}, TOWER, {}, 16, "typed"),
    "qwen2_5_vl": (QWEN, QWEN_TOWER | {"out_hidden_size": 48, "window_size": 8}, MROPE, 4, "grid"),
    "qwen2_vl": (QWEN, QWEN_TOWER | {"embed_dim": 32, "hidden_size": 48}, MROPE, 4, "grid"),
    "qwen3_vl": (QWEN, QWEN_TOWER | DEEPSTACK, MROPE, 4, "grid"),
    "qwen3_vl_moe": (QWEN, QWEN_TOWER | DEEPSTACK, MROPE, 4, "grid"),
    "smolvlm": (BY_ID, TOWER, {}, 4, "several"),
}
# Other text models than a kind's usual one.
TEXT_MODELS = [
    ("aya_vision", "cohere"),
    ("internvl", "qwen3"),
    ("llava", "mistral"),
    ("mistral3", "ministral3"),
    ("paligemma", "gemma2"),
]


def tiny_vision_config(model_type: str, text_type: str | None = None) -> Any:
    """The model's config, small, with its text model's features on."""
    own, tower, text, _, _ = CASES[model_type]
    text_config = tiny_config(text_type or VISION[model_type], **text).to_dict()
    return CONFIG_MAPPING[model_type](text_config=text_config, vision_config=tower, tie_word_embeddings=False, **own)


def tiny_vision_model(model_type: str, dtype: torch.dtype = torch.float64, text_type: str | None = None) -> Any:
    """A random model whose weights, norms and biases are all far from their trivial start."""
    torch.manual_seed(0)
    config = tiny_vision_config(model_type, text_type)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, experts_implementation="eager")
    return randomise(model.eval())


def image_prompt(model_type: str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts, each with one image of random pixels between text, as this model's processor would make them."""
    *_, count, kind = CASES[model_type]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (2, LENGTH + count), generator=torch.Generator().manual_seed(1))
    ids[:, BEFORE : BEFORE + count] = IMAGE
    side = 64 if kind == "large" else SIDE
    shape = {"several": (2, 1, 3, side, side), "anyres": (2, 2, 3, side, side), "grid": (32, 3 * 2 * PATCH * PATCH)}
    pixels = torch.randn(shape.get(kind, (2, 3, side, side)), generator=generator).to(dtype)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    is_image = (ids == IMAGE).long()
    if kind == "grid":
        ids[:, BEFORE - 1] = START
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": is_image}
    if kind in ("anyres", "sized"):
        inputs["image_sizes"] = torch.tensor([[side, side]] * 2)
    if kind in ("bidirectional", "typed"):
        inputs["token_type_ids"] = is_image if kind == "bidirectional" else torch.zeros_like(ids)
    return inputs

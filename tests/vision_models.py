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
CLIP, SIGLIP = TOWER | {"model_type": "clip_vision_model"}, TOWER | {"model_type": "siglip_vision_model"}
PIXTRAL = TOWER | {"model_type": "pixtral", "head_dim": 8}
SAM = {key: TOWER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")} | {
    **{"image_size": 64, "output_channels": 16, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]},
}
LLAMA4 = TOWER | {
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    **{"intermediate_size": 128, "pixel_shuffle_ratio": 0.5},
}
DOCLING = TOWER | {"out_hidden_size": 48, "scale_factor": 2, "use_fine_route": False}
PERCEIVER = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 6, "resampler_head_dim": 8} | {
    **{"num_key_value_heads": 3, "hidden_size": 48},
}
QWEN_TOWER = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "hidden_size": 32, "intermediate_size": 48} | {
    "out_hidden_size": 48
}
GLM_TOWER = QWEN_TOWER | {"image_size": SIDE}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
PARTIAL_MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
BY_INDEX, BY_ID = {"image_token_index": IMAGE}, {"image_token_id": IMAGE}
PINPOINTS = {"image_grid_pinpoints": [[SIDE, SIDE]]}
OVIS = {"visual_indicator_token_ids": [490, 491, 492, 493, 494], "hidden_size": 48}

# model_type: (the model's own settings, its vision tower's, its text model's, tokens per image, kind of image inputs)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, str]] = {
    "aria": (BY_INDEX | {"projector_patch_to_query_dict": {16: 8}}, TOWER, {}, 8, "plain"),
    "aya_vision": (BY_INDEX, SIGLIP, {}, 4, "plain"),
    "cohere2_vision": (BY_ID | {"alignment_intermediate_size": 64}, TOWER, {}, 4, "plain"),
    "exaone4_5": (QWEN, QWEN_TOWER | {"window_size": 8, "num_key_value_heads": 2}, {}, 4, "grid"),
    "gemma3": (BY_INDEX | {"mm_tokens_per_image": 4}, TOWER, {}, 4, "bidirectional"),
    "glm46v": (QWEN, GLM_TOWER, PARTIAL_MROPE, 4, "grid"),
    "glm4v": (QWEN, GLM_TOWER, PARTIAL_MROPE, 4, "grid"),
    "glm4v_moe": (QWEN, GLM_TOWER, PARTIAL_MROPE, 4, "grid"),
    "glm_ocr": (QWEN, GLM_TOWER, PARTIAL_MROPE, 4, "grid"),
    "got_ocr2": (BY_INDEX, SAM, {}, 16, "large"),
    "granite_docling": (BY_ID, DOCLING, {}, 4, "tiles"),
    "idefics2": (BY_ID | {"perceiver_config": PERCEIVER}, TOWER, {}, 4, "several"),
    "idefics3": (BY_ID, TOWER, {}, 4, "several"),
    "internvl": (BY_ID, TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, {}, 4, "plain"),
    "lfm2_vl": (BY_ID, TOWER | {"num_patches": 16, "model_type": "siglip2_vision_model"}, {}, 4, "patches"),
    "lighton_ocr": (BY_ID, PIXTRAL, {}, 4, "sized"),
    "llama4": (BY_INDEX, LLAMA4, {}, 4, "plain"),
    "llava": (BY_INDEX, CLIP, {}, 16, "plain"),
    "llava_next": (BY_INDEX | PINPOINTS, CLIP, {}, 36, "anyres"),
    "llava_next_video": (BY_INDEX | PINPOINTS | {"video_token_index": VIDEO}, CLIP, {}, 36, "anyres"),
    "llava_onevision": (BY_INDEX | PINPOINTS, SIGLIP, {}, 36, "anyres"),
    "mistral3": (BY_INDEX, PIXTRAL, {}, 4, "sized"),
    "ovis2": (BY_ID | OVIS, TOWER | {"hidden_stride": 2}, {}, 4, "plain"),
    "paddleocr_vl": (QWEN, TOWER, MROPE, 4, "squares"),
    "paligemma": (BY_INDEX | {"projection_dim": 48, "hidden_size": 48}, TOWER, {}, 16, "prefix"),
    "qwen2_5_vl": (QWEN, QWEN_TOWER | {"window_size": 8}, MROPE, 4, "grid"),
    "qwen2_vl": (QWEN, {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 48}, MROPE, 4, "grid"),
    "qwen3_5": (QWEN, QWEN_TOWER | {"num_position_embeddings": 16}, {}, 4, "grid"),
    "qwen3_5_moe": (QWEN, QWEN_TOWER | {"num_position_embeddings": 16}, {}, 4, "grid"),
    "qwen3_vl": (QWEN, QWEN_TOWER | DEEPSTACK, MROPE, 4, "grid"),
    "qwen3_vl_moe": (QWEN, QWEN_TOWER | DEEPSTACK, MROPE, 4, "grid"),
    "smolvlm": (BY_ID, TOWER, {}, 4, "several"),
    "video_llama_3": (BY_ID | {"video_token_id": VIDEO}, TOWER, {}, 4, "merged"),
    "vipllava": (BY_INDEX | {"vision_feature_layers": [-2, -1]}, CLIP, {}, 16, "plain"),
}
PLAIN, SIZES, GRID = (2, 3, SIDE, SIDE), [[SIDE, SIDE]] * 2, {"image_grid_thw": [[1, 4, 4]] * 2}
# kind: (shape of pixel_values for two images, other image inputs)
KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "bidirectional": (PLAIN, {}),
    "prefix": (PLAIN, {}),
    "large": ((2, 3, 64, 64), {}),
    "sized": (PLAIN, {"image_sizes": SIZES}),
    "anyres": ((2, 2, 3, SIDE, SIDE), {"image_sizes": SIZES}),
    "several": ((2, 1, 3, SIDE, SIDE), {}),
    "tiles": ((2, 1, 3, SIDE, SIDE), {"pixel_attention_mask": [[True]] * 2}),
    "patches": ((2, 16, 48), {"spatial_shapes": [[4, 4]] * 2, "pixel_attention_mask": [[1] * 16] * 2}),
    "grid": ((32, 96), GRID),
    "squares": ((32, 3, PATCH, PATCH), GRID),
    "merged": ((32, 48), GRID | {"image_merge_sizes": [2, 2]}),
}
# Other text models than a kind's usual one.
TEXT_MODELS = [
    ("aya_vision", "cohere"),
    ("internvl", "qwen3"),
    ("llava", "mistral"),
    ("mistral3", "ministral3"),
    ("paligemma", "gemma2"),
]


def tiny_vision_config(model_type: str, text_type: str | None = None, *, tied: bool = False) -> Any:
    """The model's config, small, with its text model's features on."""
    own, tower, text, _, _ = CASES[model_type]
    text_config = tiny_config(text_type or VISION[model_type], **text).to_dict()
    return CONFIG_MAPPING[model_type](text_config=text_config, vision_config=tower, tie_word_embeddings=tied, **own)


def tiny_vision_model(
    model_type: str, dtype: torch.dtype = torch.float64, text_type: str | None = None, *, tied: bool = False
) -> Any:
    """A random model whose weights, norms and biases are all far from their trivial start."""
    torch.manual_seed(0)
    config = tiny_vision_config(model_type, text_type, tied=tied)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, experts_implementation="eager")
    return randomise(model.eval())


def image_prompt(model_type: str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts, each with one image of random pixels between text, as this model's processor would make them."""
    *_, count, kind = CASES[model_type]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (2, LENGTH + count), generator=torch.Generator().manual_seed(1))
    ids[:, BEFORE : BEFORE + count] = IMAGE
    shape, others = KINDS[kind]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(shape, generator=generator).to(dtype)}
    inputs |= {name: torch.tensor(value) for name, value in others.items()}
    is_image = (ids == IMAGE).long()
    if "image_grid_thw" in others:
        ids[:, BEFORE - 1] = START
    if {"image_grid_thw", "image_merge_sizes"} & others.keys() == {"image_grid_thw"}:
        inputs["mm_token_type_ids"] = is_image
    if kind in ("bidirectional", "prefix"):
        inputs["token_type_ids"] = is_image if kind == "bidirectional" else torch.zeros_like(ids)
    return inputs

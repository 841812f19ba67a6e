"""What the supported families differ in, as data. The only place that knows a family by its name.

A field of :class:`Family` is a value, or the name of the config field that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one ``model_type`` that its config does not spell out."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None  # used where the config has none; None: hidden_size / num_attention_heads
    num_kv_heads: int | None = None  # used where the config lacks the field; None: num_attention_heads
    sliding_window: int | None = None  # used where the config lacks the field
    optional_sliding_window: bool = False  # counts only with use_sliding_window, from layer max_window_layers on
    max_window_layers: int = 0


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias"),
    "mistral": Family(num_kv_heads=8, sliding_window=4096),
    "qwen2": Family(
        qkv_bias=True, num_kv_heads=32, sliding_window=4096, optional_sliding_window=True, max_window_layers=28
    ),
    "qwen3": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        head_dim=128,
        num_kv_heads=32,
        sliding_window=4096,
        optional_sliding_window=True,
        max_window_layers=28,
    ),
}

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

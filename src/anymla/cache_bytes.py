"""Bytes of a KV cache at a length: what the tensors of transformers' DynamicCache hold, from shapes alone.

Linear-attention, convolution and state-space layers keep states whose size no length changes: they are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from anymla.methods.mla.settings import MLA
from anymla.methods.mla.window import exact_window_of
from anymla.modeling.spec import DTYPE_BYTES, ModelSpec

LENGTHS = (4096, 32768)  # tokens at which sizes are told, beside the model's context


def told_lengths(model_spec: ModelSpec) -> list[int]:
    """Numbers of tokens at which sizes are told: the usual ones that the model's context holds, and the context."""
    context = model_spec.max_position_embeddings
    return [*(length for length in LENGTHS if length < context), context]


def held(window: int | None, length: int) -> int:
    """Tokens that a layer of the cache holds once ``length`` tokens are read.

    One with a window keeps what the next token sees beside itself.
    """
    return length if window is None else min(length, max(0, window - 1))


def original_bytes(model_spec: ModelSpec, length: int, dtype: str | None = None) -> int:
    """Bytes of the original's cache at ``length`` tokens; ``dtype``: another one than the checkpoint's."""
    specs = model_spec.attention_layers.values()
    numbers = sum(held(spec.cache_window, length) * spec.stored_numbers for spec in specs)
    return numbers * DTYPE_BYTES[dtype or model_spec.dtype]


def reduced_bytes(model_spec: ModelSpec, times: int, length: int) -> float:
    """Bytes at ``length`` tokens of a cache with so many times fewer numbers than keys and values have."""
    specs = model_spec.attention_layers.values()
    numbers = sum(held(spec.cache_window, length) * spec.cached_numbers for spec in specs)
    return numbers / times * DTYPE_BYTES[model_spec.dtype]


def converted_bytes(model_spec: ModelSpec, recipe: MLA, numbers: Mapping[int, int], length: int) -> int:
    """Bytes of the converted cache at ``length`` tokens, those of its exact window included.

    ``numbers``: of latent and rope key, per token, by the layer's index.
    """
    held_numbers = sum(
        held(spec.cache_window, length) * numbers[index]
        + held(exact_window_of(spec, recipe), length) * spec.cached_numbers
        for index, spec in model_spec.attention_layers.items()
    )
    return held_numbers * DTYPE_BYTES[recipe.dtype or model_spec.dtype]

"""What the layers of transformers hand to their attention, whatever a release calls it.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # from 5.24 on, before, in families that keep an old name
KNOWN = {  # tensors that latent attention uses elsewhere, hands on to the kernel, or rightly does without
    *("position_ids", "position_embeddings", "attention_mask", "alibi", "position_bias"),
    *("cache_position", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "token_type_ids", "mm_token_type_ids"),
}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Removes the cache from the ``arguments`` of an attention and returns it; None where there is none.

    Raises:
        TypeError: an argument of another name holds a cache or a tensor, which would have to be dropped.
    """
    given = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    for name, value in arguments.items():
        if isinstance(value, Cache) or (isinstance(value, Tensor) and name not in KNOWN):
            kind = "a cache" if isinstance(value, Cache) else "a tensor"
            raise TypeError(
                f"latent attention was given {kind} as {name!r}, which it does not know: this release of transformers "
                "may be newer than these modelling files (`pip install -U anymla`, then `anymla refresh FOLDER`)"
            )
    return next((cache for cache in given if cache is not None), None)


def without_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The ``arguments`` of an attention but for the cache."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES}


def cache_argument(model: Any) -> str:
    """The name by which ``model`` takes a cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")


def cache_of(output: Any) -> Any:
    """The cache in the output of a model of transformers."""
    return next(output[name] for name in CACHE_NAMES if name in output)


def make_fit(cache: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """Gives layer ``index`` of a static cache that was made in advance the widths and the dtype of its tensors.

    ``StaticCache.early_initialization`` knows one width for keys and values alike. ``keys``, ``values``: [B,N,T,n] of
    new tokens.

    Raises:
        NotImplementedError: a graph is being traced, which already holds the tensors of other widths.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if not isinstance(layer, StaticLayer) or not layer.is_initialized:
        return
    held = (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
    if held == (keys.shape[1], keys.shape[-1], values.shape[-1]) and layer.keys.dtype == keys.dtype:
        return
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        raise NotImplementedError(
            f"layer {index}: this static cache was made in advance for {held[0]} heads of {held[1]} and {held[2]} "
            f"numbers, and this attention caches {keys.shape[-1]} and {values.shape[-1]}: use a StaticCache without "
            "early_initialization; torch.export of one is not supported"
        )
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])

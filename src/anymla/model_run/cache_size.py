"""What a cache holds, read from its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's cache: numbers and bytes per token, and the bytes of its exact window once that is full.

    A window is counted as all its tokens, at the size of those that are there.
    """

    numbers: float
    bytes: float
    window_bytes: float

    @classmethod
    def of(cls, layer: Any, width: float = 1) -> LayerCache:
        """Measures a layer of transformers' cache that holds some tokens.

        Per token that it holds: a sliding window may hold fewer than were run. ``width``: the size of a
        number in the checkpoint's dtype over its size in the one computed in: bytes are counted in the first.
        """
        numbers, size = _per_token(layer.keys, layer.values)
        exact = getattr(layer, "exact", None)
        window = 0.0 if exact is None else exact.sliding_window * _per_token(exact.keys, exact.values)[1]
        return cls(numbers=numbers, bytes=size * width, window_bytes=window * width)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What one token costs in the cache of a model, and what its exact windows cost however many tokens there are."""

    numbers_per_layer: list[float]
    bytes: float
    window_bytes: float

    @classmethod
    def of(cls, layers: list[LayerCache]) -> CacheSize:
        """The sum over a model's layers."""
        size, window = sum(layer.bytes for layer in layers), sum(layer.window_bytes for layer in layers)
        numbers = [layer.numbers for layer in layers]
        return cls(numbers_per_layer=numbers, bytes=_whole(size), window_bytes=_whole(window))

    @property
    def numbers(self) -> float:
        """Numbers per token and layer, the mean over layers; whole where it is whole."""
        return _whole(sum(self.numbers_per_layer) / len(self.numbers_per_layer))


def _per_token(*tensors: Tensor) -> tuple[float, float]:
    """Numbers and bytes per token of tensors [..., tokens, n]."""
    each = [(tensor.numel() / tensor.shape[-2], tensor.element_size()) for tensor in tensors]
    return sum(numbers for numbers, _ in each), sum(numbers * width for numbers, width in each)


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number

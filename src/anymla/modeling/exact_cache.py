"""Room in transformers' DynamicCache for the last tokens' own keys and values, beside latent and rope key.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class ExactTokens(DynamicSlidingWindowLayer):
    """Keys and values of the last ``window`` - 1 tokens: what the next one needs beside its own."""

    keys: Tensor
    values: Tensor

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens [B,G,T,d]; returns them after all that the first of them sees."""
        full: tuple[Tensor, Tensor] = super().update(key, value)
        if not self.record_past:  # its slices would hold the memory of a whole prompt
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return full


class ExactWindowLayer(DynamicLayer):
    """A layer of a DynamicCache: latent and rope key of every token, and ``exact`` for the last ones."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.exact = ExactTokens(window)

    def update(
        self, latent: Tensor, rope_key: Tensor, exact: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Adds new tokens; returns latent and rope key of all tokens, and keys and values of those seen exactly.

        ``exact``: the new tokens' own keys and values.
        """
        seen = self.exact.update(*exact)
        return super().update(latent, rope_key), seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch, for beam search."""
        super().reorder_cache(beam_idx)
        self.exact.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        self.exact.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch."""
        super().batch_select_indices(indices)
        self.exact.batch_select_indices(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes the latest tokens.

        Raises:
            RuntimeError: the window is full, and ``activate_past_recording`` was not called before.
        """
        self.exact.crop(*args, **kwargs)
        super().crop(*args, **kwargs)

    def activate_past_recording(self) -> None:
        """Keeps exact tokens until the next ``crop``, as assisted decoding asks for."""
        self.exact.activate_past_recording()

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.exact.reset()

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        super().offload()
        self.exact.offload()

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        super().prefetch()
        self.exact.prefetch()


def make_room(cache: Any, index: int, window: int) -> None:
    """Gives layer ``index`` of ``cache`` room for exact tokens, unless it has it.

    Raises:
        NotImplementedError: another kind of cache than a DynamicCache, or one that was filled without.
    """
    layers: list[Any] = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:  # a cache made without a config grows as it is used
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    found = layers[index]
    if type(found) is DynamicLayer and not found.is_initialized:
        layers[index] = ExactWindowLayer(window)
    elif not isinstance(found, ExactWindowLayer):
        without = " that was filled without it" if type(found) is DynamicLayer else ""
        raise NotImplementedError(
            f"a model with an exact window of {window} tokens needs a DynamicCache, "
            f"got a {type(found).__name__}{without}"
        )

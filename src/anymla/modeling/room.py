"""Memory for the numbers of a chunk of a coded cache, which every chunk of every layer takes again.

One of the modelling files that travel with every converted checkpoint; it needs torch only. New memory costs a CPU
about as much time as all that is computed in it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Room:
    """Tensors by name. The next one of a name may lie where the last one lay."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, bool], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor without meaning."""
        if device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)  # a GPU's memory is at hand, gradients need their own
        key, size = (name, dtype, torch.is_inference_mode_enabled()), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """``one * other``, in the shape of ``one``."""
        if torch.is_grad_enabled():
            return one * other
        return torch.mul(one, other, out=self.empty("product", one.shape, one.dtype, one.device))


class _Threads(threading.local):
    def __init__(self) -> None:
        self.room = Room()


_threads = _Threads()


def room_of_thread() -> Room:
    """The room of this thread: what it gives is read before the next chunk is."""
    return _threads.room

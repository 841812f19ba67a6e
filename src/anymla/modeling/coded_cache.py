"""A cache of rows of bytes, beside the exact first tokens of every sequence, in the caches of transformers.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

Shapes: B batch, E latest tokens, n coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer, StaticLayer

from .decode_kernel import kernel_runs
from .exact_cache import ExactTokens
from .placed_tokens import NewTokens, PlacedTokens

GROWTH = 8  # rows grow by one in so many, and by
LEAST_GROWTH = 64  # this many at least: appending a token copies nothing but then
LINE = 64  # bytes that a CPU's caches hold together


class CodedLayer:
    """Goes before a layer class of transformers, whose keys and values then are rows of bytes [B,1,S,row_bytes]."""

    _layer_type = None  # not for the register of transformers
    first_tokens: int
    first: PlacedTokens | None = None
    settled = False  # whether the first tokens were all read: then no single token asks the device for its position
    room: tuple[Tensor, Tensor] | None = None  # rows that keys and values begin, and more after them
    latest: ExactTokens | None = None  # room for the last tokens as they were before coding; None: they are not kept
    blank: NewTokens | None = None  # one token of zeros: how large an exact one is
    keys: Tensor
    values: Tensor
    is_initialized: bool

    def update(
        self, keys: Tensor, values: Tensor, tokens: NewTokens
    ) -> tuple[tuple[Tensor, Tensor], tuple[PlacedTokens | None, tuple[Tensor, Tensor] | None]]:
        """Adds rows of new tokens; returns the rows of all that the first of them sees, and what is kept exactly.

        That are the first tokens, and the latest [B,1,E,n], up to the newest one.
        """
        if self.blank is None:
            self.blank = NewTokens(*(torch.zeros_like(states[:1, :1]) for states in tokens[:2]))
        self._keep_first(tokens)
        latest = None if self.latest is None else self.latest.update(tokens.keys[:, None], tokens.values[:, None])
        exact = (self.first, latest)
        if isinstance(self, DynamicLayer) and not self.is_sliding:
            return self._append(keys, values), exact
        rows = super().update(keys, values)  # type: ignore[misc]
        if isinstance(self, DynamicSlidingWindowLayer):
            if keys.shape[2] > 1 and not self.record_past:  # slices would hold the memory of a whole prompt
                self.keys, self.values = self.keys.clone(), self.values.clone()
            self._forget()
        return rows, exact

    def _keep_first(self, tokens: NewTokens) -> None:
        """Keeps the first tokens once these were read."""
        single = tokens.positions is not None and tokens.keys.shape[1] == 1
        if not self.first_tokens or (single and self.settled):
            return
        self.first = tokens.first(self.first, int(self.get_seq_length()), self.first_tokens)
        self.settled = tokens.settle(self.first_tokens)

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """As always; without rows the tensors have their widths already."""
        super().lazy_initialization(keys, values)  # type: ignore[misc]
        if isinstance(self, DynamicLayer):
            self.keys, self.values, self.room = keys[:, :, :0], values[:, :, :0], None

    def get_seq_length(self) -> int:
        """Tokens that were read."""
        if isinstance(self, DynamicLayer) and not self.is_sliding:
            return self.keys.shape[2] if self.is_initialized else 0
        length: int = super().get_seq_length()  # type: ignore[misc]
        return length

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts new rows after the others, in place if there is room."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        rooms = self.room or (self.keys, self.values)
        length = self.keys.shape[2] + keys.shape[2]
        given = zip((self.keys, self.values), rooms, (keys, values), strict=True)
        self.room = _fill(*next(given)), _fill(*next(given))
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values

    def _forget(self) -> None:
        """Gives the exact first tokens up once their columns are out of the window."""
        start = self.get_seq_length() - self.keys.shape[2]
        if self.first is not None and start > 0 and max(self.first.places.known, default=-1) < start:
            self.first = None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.first is not None:
            self.first = self.first.each(change)

    def _move(self, device: Any) -> None:
        if self.first is not None:
            self.first = self.first.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.latest is not None:
            self.latest.reorder_cache(beam_idx)
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.latest is not None:
            self.latest.batch_repeat_interleave(repeats)
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.latest is not None:
            self.latest.batch_select_indices(indices)
        self._change(lambda tensor: tensor[indices, ...])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes the latest tokens.

        Raises:
            RuntimeError: the exact window is full, and ``activate_past_recording`` was not called before.
        """
        if self.latest is not None:
            self.latest.crop(*args, **kwargs)
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.first is not None:
            length = int(self.get_seq_length())
            columns = self.first.columns.where(self.first.columns < length, -1)
            placed = PlacedTokens(*self.first[:2], columns)
            self.first = placed.last(min(length, self.first_tokens)) if length else None
        self.settled = False
        if isinstance(self, DynamicSlidingWindowLayer):
            self._forget()

    def activate_past_recording(self) -> None:
        """Keeps what would be given up until the next ``crop``, as assisted decoding asks for."""
        if isinstance(self, DynamicSlidingWindowLayer):
            super().activate_past_recording()  # type: ignore[misc]
        if self.latest is not None:
            self.latest.activate_past_recording()

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()  # type: ignore[misc]
        if self.latest is not None:
            self.latest.reset()
        self.first = self.room = None
        self.settled = False

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        super().offload()  # type: ignore[misc]
        if self.latest is not None:
            self.latest.offload()
        self.room = None
        self._move("cpu")

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        super().prefetch()  # type: ignore[misc]
        if self.latest is not None:
            self.latest.prefetch()
        if self.is_initialized:
            self._move(self.device)  # type: ignore[attr-defined]


def _fill(held: Tensor, room: Tensor, new: Tensor) -> Tensor:
    """``room`` with ``new`` after the rows of ``held``. It is a larger one if it is full or begins with others."""
    batch, heads, length, width = held.shape
    total = length + new.shape[2]
    begins = room.data_ptr() == held.data_ptr() and room.shape[0] == batch and room.stride() == held.stride()
    writable = torch.is_inference_mode_enabled() or not room.is_inference()
    if not (begins and writable) or room.shape[2] < total:
        columns = total + max(total // GROWTH, LEAST_GROWTH)
        if kernel_runs(new.device):
            room = new.new_empty(batch, heads, columns, width)
        else:  # one byte of all tokens lies side by side, as codecs read them: in an odd number of lines, for bytes of
            # one token that are powers of two apart would share few places in a CPU's caches
            room = new.new_empty(batch, heads, width, LINE * (-(-columns // LINE) | 1)).mT
        room[:, :, :length] = held
    room[:, :, length:total] = new
    return room


@functools.cache
def _coded(kind: Any) -> Any:
    """``kind`` with CodedLayer before it."""
    return type(f"Coded{kind.__name__}", (CodedLayer, kind), {})


def make_room(cache: Any, index: int, first_tokens: int, exact_window: int) -> CodedLayer:
    """Makes layer ``index`` of ``cache`` one of rows of bytes, unless it is.

    Raises:
        NotImplementedError: a kind of cache that holds no rows, or one that was filled by another attention.
    """
    layers: list[Any] = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:  # a cache made without a config grows as it is used
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    layer = layers[index]
    if isinstance(layer, CodedLayer):
        return layer
    filled = layer.is_initialized and not isinstance(layer, StaticLayer)
    if filled or isinstance(layer, QuantizedLayer) or not isinstance(layer, DynamicLayer | StaticLayer):
        without = " that was filled before" if filled else ""
        raise NotImplementedError(
            f"a model with a coded cache needs a DynamicCache or a StaticCache, got a {type(layer).__name__}{without}"
        )
    found: Any = type(layer)
    kind: Any = _coded(found)
    coded: CodedLayer = kind.__new__(kind)
    latest = ExactTokens(exact_window) if exact_window else None
    vars(coded).update(vars(layer), first_tokens=first_tokens, latest=latest)
    layers[index] = coded
    return coded

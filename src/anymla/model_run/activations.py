"""Hidden states of all calibration windows, in memory while a budget lasts, else in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.io.device import copied_to
from anymla.io.safetensors import bytes_of, durable


class Budget:
    """Bytes of activations that may be in memory at once, and the folder for those that do not fit."""

    def __init__(self, size: int, folder: Path) -> None:
        self.left, self.folder = size, folder

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes fit; if so they are taken."""
        fits = size <= self.left
        self.left -= size * fits
        return fits


class Activations:
    """Hidden states [N,T,D]; slices of windows are read, onto ``device``, and written.

    With a ``name`` it is a stream that moves on layer by layer: where it lies in a file, writes go to a second file,
    and reads see the first until :meth:`save`. A process killed in between finds the first one whole. ``maps``: of the
    layers that share their attention map with later ones (maps.py).
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, budget: Budget, name: str | None = None
    ) -> None:
        self.shape, self.dtype, self.device, self.budget, self.name = shape, dtype, device, budget, name
        self.window = dtype.itemsize * shape[1] * shape[2]  # bytes
        self.maps: dict[int, Activations] = {}
        self._taken = budget.take(self.window * shape[0])
        self._memory = torch.empty(shape, dtype=dtype) if self._taken else None
        self._source: Any = None
        self._sink: Any = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, windows: slice) -> Tensor:
        if self._memory is not None:
            return copied_to(self.device, self._memory[windows])
        first, last, _ = windows.indices(len(self))
        content = torch.empty(max(0, last - first), *self.shape[1:], dtype=self.dtype)
        if content.numel():
            self._source.seek(first * self.window)
            if self._source.readinto(bytes_of(content)) != len(content) * self.window:
                raise OSError(f"{self._source.name} ends too early")
        return copied_to(self.device, content)

    def __setitem__(self, windows: slice, values: Tensor) -> None:
        if self._memory is not None:
            self._memory[windows] = values.to("cpu")
            return
        if self._sink is None:
            self._sink = self._open()
        self._sink.seek(windows.indices(len(self))[0] * self.window)
        self._sink.write(bytes_of(values.to("cpu", self.dtype).contiguous()))

    def split(self, batch: int, windows: slice = slice(None)) -> Iterator[Tensor]:
        """``windows`` in batches, in order."""
        first, last, _ = windows.indices(len(self))
        for start in range(first, last, batch):
            yield self[start : min(start + batch, last)]

    def like(self, dtype: torch.dtype) -> Activations:
        """Room for as many numbers, without a name."""
        return Activations(self.shape, dtype, self.device, self.budget)

    def save(self, path: Path) -> None:
        """Puts what was written at ``path``, durably; from now on it is what is read."""
        partial = self.budget.folder / f"{self.name}.next"
        if self._memory is not None:
            with open(partial, "wb") as file:
                file.write(bytes_of(self._memory))
                durable(file)
        elif self._sink is not None:
            durable(self._sink)
            self._source, self._sink = self._sink, None
        else:  # no window
            partial.touch()
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Takes up what :meth:`save` put at ``path``."""
        source = open(path, "rb")  # noqa: SIM115  stays open while it is read
        if self._memory is None:
            self._source = source
            return
        with source:
            if self._memory.numel() and source.readinto(bytes_of(self._memory)) != self._memory.nbytes:
                raise OSError(f"{path} ends too early")

    def close(self) -> None:
        """Gives its memory back to the budget."""
        self.budget.left += self.window * len(self) * self._taken
        self._memory = self._source = self._sink = None

    def _open(self) -> Any:
        if self.name is not None:
            return open(self.budget.folder / f"{self.name}.next", "w+b")
        self._source = tempfile.TemporaryFile(dir=self.budget.folder)  # noqa: SIM115
        return self._source

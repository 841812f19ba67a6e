"""The streams of hidden states that a sweep moves from layer to layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anymla.distributed import rank, world
from anymla.errors import TextError
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.maps import restore_maps, save_maps
from anymla.sweep.layer import CalibrationSplit


class SavedStreams:
    """Streams that are saved together after each layer, before that layer counts as done."""

    def __init__(self, folder: Path, *streams: Activations) -> None:
        self.folder, self.streams = folder, streams

    def path(self, stream: Activations, layers: int) -> Path:
        """Where one of them lies as it was after ``layers`` layers."""
        return self.folder / f"{stream.name}-after-{layers}"

    def save(self, layers: int) -> None:
        """Keeps all as they are after ``layers`` layers."""
        for stream in self.streams:
            save_maps(stream, self.folder)
            stream.save(self.path(stream, layers))

    def restore(self, layers: int) -> None:
        """Takes all up after ``layers`` layers."""
        for stream in self.streams:
            stream.restore(self.path(stream, layers))
            restore_maps(stream, self.folder)

    def keep_only(self, *layers: int) -> None:
        """Removes all that is saved but what was kept after ``layers`` layers."""
        for stream in self.streams:
            kept = {self.path(stream, number) for number in layers}
            for path in self.folder.glob(f"{stream.name}-after-*"):
                if path not in kept:
                    path.unlink()


class Streams(SavedStreams):
    """The hidden states of the original, and those of the model whose layers are converted so far."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, budget: Budget) -> None:
        self.original = Activations(shape, dtype, device, budget, f"original-{rank()}")
        self.converted = Activations(shape, dtype, device, budget, f"converted-{rank()}")
        super().__init__(budget.folder, self.original, self.converted)


def own_windows(windows: Tensor, split: CalibrationSplit) -> tuple[Tensor, CalibrationSplit]:
    """This process's part of each kind of window; all processes' parts together are ``windows``.

    Raises:
        TextError: there are more processes than windows to choose on.
    """
    kinds = (split.fit, split.choice, split.held_out)
    parts = [windows[kind][rank() :: world()] for kind in kinds]
    if min(len(windows[kind]) for kind in kinds[:2]) < world():
        raise TextError(
            f"{world()} processes need {4 * world()} calibration windows and there are {len(windows)}: give more "
            "--calibration-tokens or a shorter --calibration-length"
        )
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
    own = CalibrationSplit(slice(0, first), slice(first, second), slice(second, second + len(parts[2])))
    return torch.cat(parts), own

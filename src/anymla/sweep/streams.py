"""The two streams of hidden states that a sweep moves from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor

from anymla.distributed import rank, world
from anymla.errors import TextError
from anymla.model_run.activations import Activations, Budget
from anymla.sweep.layer import CalibrationSplit


class Streams:
    """The hidden states of the original, and those of the model whose layers are converted so far.

    Both are saved after each layer, before that layer counts as done; what was saved before goes once it does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, budget: Budget) -> None:
        self.original = Activations(shape, dtype, device, budget, f"original-{rank()}")
        self.converted = Activations(shape, dtype, device, budget, f"converted-{rank()}")
        self.folder = budget.folder

    def save(self, layers: int) -> None:
        """Keeps both as they are after ``layers`` layers."""
        for stream in (self.original, self.converted):
            stream.save(self.folder / f"{stream.name}-after-{layers}")

    def restore(self, layers: int) -> None:
        """Takes both up after ``layers`` layers."""
        for stream in (self.original, self.converted):
            stream.restore(self.folder / f"{stream.name}-after-{layers}")

    def keep_only(self, *layers: int) -> None:
        """Removes all that is saved but what was kept after ``layers`` layers."""
        for stream in (self.original, self.converted):
            kept = {f"{stream.name}-after-{number}" for number in layers}
            for path in self.folder.glob(f"{stream.name}-after-*"):
                if path.name not in kept:
                    path.unlink()


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

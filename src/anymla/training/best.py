"""The best of all that a run was, the start included: scored on held-out text, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from anymla.distributed import first_decides, rank
from anymla.io.safetensors import read_header, write_tensors


@dataclass
class Best:
    """The weights with the lowest score so far, in the file ``path``; ``scores``: the start's, then all after it.

    ``patience``: scores in a row without a better one after which a run ends; None: it goes on to its last step.
    """

    path: Path
    patience: int | None
    scores: list[float] = field(default_factory=list)

    def take(self, score: float, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Adds a score, and keeps the ``weights`` if it is the best; all processes call it."""
        better = first_decides(bool(self.scores) and score < min(self.scores))
        self.scores.append(score)
        if better:
            found = weights()
            if rank() == 0:
                partial = self.path.with_suffix(".partial")
                write_tensors(partial, {name: tensor.contiguous() for name, tensor in found.items()})
                partial.replace(self.path)

    @property
    def place(self) -> int:
        """Which score is the best: 0 is the start."""
        return self.scores.index(min(self.scores))

    @property
    def ends(self) -> bool:
        """Whether the last scores say that more steps help no more."""
        return self.patience is not None and len(self.scores) - 1 - self.place >= self.patience

    def weights(self) -> dict[str, Tensor]:
        """The weights that learned, at the best score; none where that is the start's."""
        return {name: stored.read() for name, stored in read_header(self.path).items()} if self.place else {}

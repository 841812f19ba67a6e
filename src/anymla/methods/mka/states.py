"""What layers make of calibration text: the states of each window's last token, and how far every token moves.

Shapes: N windows, B of them in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.distributed import all_rows, all_sum_number
from anymla.methods.base import Survey

if TYPE_CHECKING:
    from anymla.model_run.stream import LayerBatch
    from anymla.sweep.layer import Layer


class LayerStates(Survey):
    """Of each layer: ``before`` and ``after`` it the last tokens' states [N,D], and its block ``influence``."""

    def observer(self, layer: Layer) -> StatesSeen:
        """Collects both."""
        return StatesSeen()

    def layer(self, layer: Layer, observed: StatesSeen) -> dict[str, Any]:
        """What was collected, of all processes."""
        return observed.facts()


class StatesSeen:
    """Keeps last tokens in float64, and sums 1 - cos(x_in, x_out) over all tokens."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.moved, self.tokens = 0.0, 0

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch of states [B,T,D] before and after the layer."""
        before, after = batch.hidden.double(), batch.output.double()
        self.before.append(before[:, -1].clone())
        self.after.append(after[:, -1].clone())
        cosines = torch.cosine_similarity(before, after, dim=-1)
        self.moved += (1 - cosines).sum().item()
        self.tokens += cosines.numel()

    def facts(self) -> dict[str, Any]:
        """What was collected, of all processes."""
        before, after = (all_rows(torch.cat(rows)) for rows in (self.before, self.after))
        moved, tokens = (all_sum_number(number, before.device) for number in (self.moved, self.tokens))
        return {"before": before, "after": after, "influence": moved / tokens}


def angle(before: Tensor, after: Tensor) -> float:
    """The mean angle between last tokens' states [N,D] before a block of layers and after it, over pi."""
    cosines = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return (cosines.arccos() / torch.pi).mean().item()

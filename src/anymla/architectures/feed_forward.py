"""Finds the feed-forward network of a decoder layer, under the names that families give it; knows no family.

Shapes: D hidden, I neurons. A neuron is a row of each projection up (two rows, where gate and up are one matrix) and a
column of the projection down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anymla.architectures.names import DOWNS
from anymla.architectures.parts import attention_path
from anymla.errors import UnsupportedModelError


@dataclass(frozen=True)
class FeedForward:
    """Names in the layer of what makes the I neurons (gate and up, or both in one), and of what reads them."""

    ups: tuple[str, ...]
    down: str
    neurons: int


def feed_forward(layer: nn.Module) -> FeedForward:
    """The feed-forward network of a layer.

    Raises:
        UnsupportedModelError: it has none, or several.
    """
    attention = attention_path(layer)
    found = [
        name
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in DOWNS
        and not (attention is not None and f"{name}.".startswith(f"{attention}."))
        and is_linear(module)
    ]
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(layer).__name__} has {len(found) or 'no'} feed-forward network, not one")
    parent, _, down = found[0].rpartition(".")
    neurons = sizes(layer.get_submodule(found[0]))[1]
    ups = tuple(
        f"{parent}.{name}" if parent else name
        for name, module in layer.get_submodule(parent).named_children()
        if is_linear(module) and sizes(module)[0] in (neurons, 2 * neurons) and name != down
    )
    return FeedForward(ups, found[0], neurons)


def is_linear(module: Any) -> bool:
    """Returns whether it is a Linear, or GPT-2's Conv1D, whose weight is turned."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def sizes(module: Any) -> tuple[int, int]:
    """Numbers that a linear module gives and takes."""
    out, taken = weight_of(module).shape
    return out, taken


def weight_of(module: Any) -> Tensor:
    """The weight [out, in] of a linear module, as a view."""
    weight: Tensor = module.weight
    return weight.T if type(module).__name__ == "Conv1D" else weight

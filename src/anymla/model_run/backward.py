"""Gradients of the final loss through a decoder, one layer at a time: each layer is run again, and one alone is held.

Shapes: N windows of T tokens, D hidden, V vocabulary. The loss is the mean over the tokens of a window of the negative
log-likelihood of the next one, in nats; each window is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anymla.model_run.activations import Activations
from anymla.model_run.stream import LayerBatch, final_logits, first

PART_BYTES = 64 << 20  # of logits at once


def loss_gradient(model: Any, hidden: Tensor, ids: Tensor, *, tuples: bool) -> tuple[Tensor, Tensor]:
    """The loss [] of a window and its gradient [1,T,D] with respect to the final hidden states, before the last norm.

    ``hidden`` [1,T,D], ``ids`` [1,T]. ``tuples``: whether layers of this family return tuples. Logits are made in parts
    of at most 64 MiB.
    """
    length = ids.shape[1] - 1
    states = hidden.detach().requires_grad_(True)
    size = max(1, PART_BYTES // (model.config.get_text_config().vocab_size * hidden.element_size()))
    loss = hidden.new_zeros((), dtype=torch.float64)
    for start in range(0, length, size):
        part = slice(start, min(start + size, length))
        with torch.enable_grad():
            logits = final_logits(model, states[:, part], tuples=tuples)[0]
            lost = cross_entropy(logits, ids[0, part.start + 1 : part.stop + 1], reduction="sum") / length
        lost.backward()
        loss += lost.detach()
    return loss, torch.zeros_like(hidden) if states.grad is None else states.grad


def layer_gradients(
    layer: nn.Module, hidden: Activations, gradient: Activations, arguments: dict[str, Any], *, weights: bool = True
) -> Iterator[LayerBatch]:
    """Runs a layer again and goes back through it, one window after the other.

    Args:
        layer: with its weights; their ``grad`` is that of the window which was yielded last, and gone at the end.
        hidden: hidden states before the layer [N,T,D].
        gradient: with respect to those after it [N,T,D]; moves on to those before it, in place.
        arguments: what the layer is called with beside hidden states.
        weights: whether the weights get their ``grad``.
    """
    asked = [weight for weight in layer.parameters() if weights and weight.is_floating_point()]
    for weight in asked:
        weight.requires_grad_(True)
    try:
        for window in range(len(hidden)):
            place = slice(window, window + 1)
            states, after = hidden[place].detach().requires_grad_(True), gradient[place]
            for weight in asked:
                weight.grad = None
            with torch.enable_grad():
                output = first(layer(states, **arguments))
            output.backward(after)
            before = torch.zeros_like(states) if states.grad is None else states.grad
            yield LayerBatch(windows=place, hidden=states.detach(), output=output.detach(), gradient=after)
            gradient[place] = before
    finally:
        for weight in asked:
            weight.grad = None
            weight.requires_grad_(False)

"""Runs a decoder one layer at a time, so that only one layer's activations are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymla.errors import UnsupportedModelError

SCORE_ELEMENTS = 1 << 22  # attention scores per batch; bounds the batch, and so the memory of its activations
LAYER_LISTS = ("layers", "h", "blocks")
INNER_MODELS = ("language_model", "text_model", "model", "decoder")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, or of the text model inside a vision-language model, in order.

    Raises:
        UnsupportedModelError: they are not where any known family keeps them.
    """
    module = model.base_model
    while module is not None:
        for name in LAYER_LISTS:
            if isinstance(layers := getattr(module, name, None), nn.ModuleList):
                return layers
        module = next((getattr(module, name) for name in INNER_MODELS if hasattr(module, name)), None)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers where anymla looks for it")


@contextmanager
def _layers_run(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets every layer run ``forward(index, hidden_states, *args, **kwargs)`` instead of its own."""
    for index, layer in enumerate(layers):
        layer.forward = lambda *args, index=index, **kwargs: forward(index, *args, **kwargs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states, and whether it gives a tuple."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def batch(self, heads: int, length: int, *, shared: bool = True) -> int:
        """Windows per batch such that their attention scores stay bounded; one where arguments belong to a window."""
        return max(1, SCORE_ELEMENTS // (heads * length * length)) if shared else 1


@dataclass(frozen=True)
class LayerInputs:
    """What the decoder hands to its layers: embedded windows [N,T,D] and each layer's other arguments."""

    hidden: Tensor
    calls: list[LayerCall]


@torch.no_grad()
def layer_inputs(model: Any, windows: Tensor, *, tuples: bool) -> LayerInputs:
    """Embeds ``windows`` [N,T] and records the arguments (mask, rope tables) that each layer is called with.

    ``tuples``: whether layers of this family return tuples.
    """
    calls: dict[int, LayerCall] = {}
    embedded: list[Tensor] = []

    def record(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[index] = LayerCall(args, kwargs)
        if index == 0:
            embedded.append(hidden_states)
        return (hidden_states, None) if tuples else hidden_states

    with _layers_run(decoder_layers(model), record):
        for window in windows:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    return LayerInputs(torch.cat(embedded), [calls[index] for index in range(len(calls))])


@torch.no_grad()
def logits_of(model: Any, hidden: Tensor, *, tuples: bool) -> Tensor:
    """Logits [B,T,V] of final hidden states [B,T,D]: the model's own last norm and head."""
    output = (hidden, None) if tuples else hidden
    with _layers_run(decoder_layers(model), lambda index, *args, **kwargs: output):
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


class _Reached(Exception):
    """Ends a layer's run where its attention begins."""


@dataclass(frozen=True)
class AttentionStep:
    """One batch through a layer: its attention's input, other arguments, output; and the layer's output, [B,T,D]."""

    inputs: Tensor
    arguments: dict[str, Any]
    attended: Tensor
    output: Tensor


@torch.no_grad()
def attention_inputs(layer: Any, attention: nn.Module, hidden: Tensor, call: LayerCall, batch: int) -> Iterator[Tensor]:
    """Yields per batch the attention module's input [B,T,D], and runs nothing behind it."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in hidden.split(batch):
            with suppress(_Reached):
                layer(part, *call.args, **call.kwargs)
            yield seen.pop()
    finally:
        hook.remove()


@torch.no_grad()
def run_layer(layer: Any, attention: nn.Module, hidden: Tensor, call: LayerCall, batch: int) -> Iterator[AttentionStep]:
    """Runs ``hidden`` [N,T,D] through a layer in batches."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["arguments"] = dict(kwargs)
        seen["input"] = args[0] if args else seen["arguments"].pop("hidden_states")
        seen["residual"] = args[1] if len(args) > 1 else 0  # BLOOM's attention adds it

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = first(output) - seen["residual"]

    hooks = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(after),
    ]
    try:
        for part in hidden.split(batch):
            output = first(layer(part, *call.args, **call.kwargs))
            yield AttentionStep(seen["input"], seen["arguments"], seen["output"], output)
    finally:
        for hook in hooks:
            hook.remove()


def first(output: Any) -> Tensor:
    """The hidden states among what a module gives."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden

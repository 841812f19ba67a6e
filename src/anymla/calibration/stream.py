"""Runs a decoder one layer at a time, so that only one layer's activations are held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymla.calibration.activations import Activations

SCORE_ELEMENTS = 1 << 22  # attention scores per batch; bounds the batch, and so the memory of its activations


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


class _Reached(Exception):
    """Ends a run where enough is known."""


@contextmanager
def _layers_run(layers: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Lets every layer run ``forward(index, hidden_states, *args, **kwargs)`` instead of its own."""
    for index, layer in enumerate(layers):
        layer.forward = lambda *args, index=index, **kwargs: forward(index, *args, **kwargs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass(frozen=True)
class LayerInputs:
    """What the decoder hands to its layers: embedded windows [B,T,D] and each layer's arguments, by name."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


def batch_size(heads: int, length: int) -> int:
    """Windows per batch such that their attention scores stay bounded."""
    return max(1, SCORE_ELEMENTS // (heads * length * length))


@torch.no_grad()
def layer_inputs(model: Any, ids: Tensor, *, use_cache: bool = False) -> LayerInputs:
    """Embeds windows ``ids`` [B,T] and records what each layer is called with: mask, rope tables, cache.

    Runs no layer and nothing behind them.
    """
    layers = decoder_layers(model)
    names = [list(inspect.signature(layer.forward).parameters)[1:] for layer in layers]  # after the hidden states
    arguments: list[dict[str, Any]] = [{} for _ in layers]
    embedded: list[Tensor] = []

    def record(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded.append(hidden_states)
        arguments[index] = dict(zip(names[index], args, strict=False)) | kwargs
        if index == len(layers) - 1:
            raise _Reached
        return hidden_states

    with _layers_run(layers, record), suppress(_Reached):
        model(input_ids=ids, use_cache=use_cache, logits_to_keep=1)
    return LayerInputs(embedded[0], arguments)


@torch.no_grad()
def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits [B,T,V] of final hidden states [B,T,D]: the model's own last norm and head."""
    with _layers_run(decoder_layers(model), lambda index, *args, **kwargs: hidden):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


@torch.no_grad()
def attention_inputs(layer: Any, hidden: Activations, arguments: dict[str, Any], batch: int) -> Iterator[Tensor]:
    """Yields per batch the attention module's input [B,T,D], and runs nothing behind it."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = layer.self_attn.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in hidden.split(batch):
            with suppress(_Reached):
                layer(part, **arguments)
            yield seen.pop()
    finally:
        hook.remove()


@torch.no_grad()
def run_layer(
    layer: Any, hidden: Activations, arguments: dict[str, Any], batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields per batch: the attention module's input, its output, and the layer's output, [B,T,D] each."""
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True),
        layer.self_attn.register_forward_hook(after),
    ]
    try:
        for part in hidden.split(batch):
            output = layer(part, **arguments)
            yield seen["input"], seen["output"], output[0] if isinstance(output, tuple) else output
    finally:
        for hook in hooks:
            hook.remove()

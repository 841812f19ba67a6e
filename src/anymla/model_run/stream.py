"""Runs a decoder one layer at a time, so that only one layer's activations are held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from anymla.errors import UnsupportedModelError
from anymla.model_run.activations import Activations
from anymla.model_run.maps import with_maps

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


class _Reached(Exception):
    """Ends a run where enough is known."""


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
class LayerInputs:
    """What the decoder hands to its layers: embedded windows [B,T,D] and each layer's arguments, by name."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


def batch_size(heads: int, length: int) -> int:
    """Windows per batch such that their attention scores stay bounded."""
    return max(1, SCORE_ELEMENTS // (heads * length * length))


@torch.no_grad()
def layers_give_tuples(model: Any, ids: Tensor) -> bool:
    """Whether the decoder takes apart what its layers return: a family's may do so in one release and not in the next.

    Told by what becomes of a tuple that the first layer returns. ``ids`` [B,T]: any tokens.
    """
    given: list[Any] = []

    def run(index: int, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(hidden_states)
        if index == 1:
            raise _Reached
        return hidden_states, None

    with _layers_run(decoder_layers(model), run):
        try:
            model.base_model(input_ids=ids, use_cache=False)
        except _Reached:
            return isinstance(given[1], Tensor)
        except (TypeError, AttributeError):  # of something that is done to hidden states
            return False
    return True  # a single layer


@torch.no_grad()
def layer_inputs(model: Any, ids: Tensor, *, tuples: bool, use_cache: bool = False) -> LayerInputs:
    """Embeds windows ``ids`` [B,T] and records what each layer is called with: mask, rope tables, cache.

    Runs no layer and nothing after them. ``tuples``: what layers_give_tuples says of the model.
    """
    layers = decoder_layers(model)
    names = [list(inspect.signature(layer.forward).parameters)[1:] for layer in layers]  # after the hidden states
    arguments: list[dict[str, Any]] = [{} for _ in layers]
    embedded: list[Tensor] = []

    def record(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        embedded.append(hidden_states)
        arguments[index] = dict(zip(names[index], args, strict=False)) | kwargs
        if index == len(layers) - 1:
            raise _Reached
        return (hidden_states, None) if tuples else hidden_states

    with _layers_run(layers, record), suppress(_Reached):
        model.base_model(input_ids=ids, use_cache=use_cache)
    return LayerInputs(embedded[0], arguments)


@torch.no_grad()
def logits_of(model: Any, hidden: Tensor, *, tuples: bool) -> Tensor:
    """Logits [B,T,V] of final hidden states [B,T,D], without gradients."""
    return final_logits(model, hidden, tuples=tuples)


def final_logits(model: Any, hidden: Tensor, *, tuples: bool) -> Tensor:
    """Logits [B,T,V] of final hidden states [B,T,D]: the model's own last norm and head."""
    output = (hidden, None) if tuples else hidden
    inputs: dict[str, Tensor] = {"inputs_embeds": hidden}  # whatever they are; their table need not be read
    if model.get_input_embeddings().weight.shape[1] != hidden.shape[-1]:
        inputs = {"input_ids": torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)}
    with _layers_run(decoder_layers(model), lambda index, *args, **kwargs: output):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def check_runs(model: Any, hidden: Tensor, *, tuples: bool) -> None:
    """Makes logits of a few hidden states [B,T,D], before hours go into layers of a model that has none.

    Raises:
        UnsupportedModelError: transformers' own code fails, as it does for Llama 4 with images in 5.24.0.
    """
    try:
        logits_of(model, hidden, tuples=tuples)
    except (AttributeError, TypeError) as error:
        release = f"transformers {transformers.__version__}"
        raise UnsupportedModelError(
            f"{release} cannot run {type(model).__name__}: {error!s:.160}; install another release of it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class AttentionRun:
    """One batch through an attention: its input [B,T,D], its other arguments, its output [B,T,D] without residual."""

    inputs: Tensor
    arguments: dict[str, Any]
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerBatch:
    """One batch through a layer, forwards, or forwards and back.

    Args:
        windows: which ones.
        hidden, output: hidden states before and after the layer [B,T,D].
        attention: what went through its attention; None where it has no softmax attention, and on the way back.
        gradient: on the way back, that of the loss with respect to ``output`` [B,T,D]. The layer's weights then have
            theirs in ``grad``, of this batch alone.
    """

    windows: slice
    hidden: Tensor
    output: Tensor
    attention: AttentionRun | None = None
    gradient: Tensor | None = None


@torch.no_grad()
def attention_inputs(
    layer: Any, attention: nn.Module, hidden: Activations, arguments: dict[str, Any], batch: int
) -> Iterator[Tensor]:
    """Yields per batch the attention module's input [B,T,D], and runs nothing after it."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in hidden.split(batch):
            with suppress(_Reached):
                layer(part, **arguments)
            yield seen.pop()
    finally:
        hook.remove()


@torch.no_grad()
def run_layer(
    layer: Any, attention: nn.Module | None, hidden: Activations, arguments: dict[str, Any], batch: int
) -> Iterator[LayerBatch]:
    """Runs ``hidden`` [N,T,D] through a layer in batches; its ``attention`` is listened to."""
    seen: list[AttentionRun] = []
    with _listening(attention, seen):
        for start, part in zip(range(0, len(hidden), batch), hidden.split(batch), strict=True):
            windows = slice(start, start + len(part))
            output = first(layer(part, **with_maps(layer, hidden, windows, arguments)))
            yield LayerBatch(windows=windows, hidden=part, output=output, attention=seen.pop() if seen else None)


@contextmanager
def _listening(attention: nn.Module | None, seen: list[AttentionRun]) -> Iterator[None]:
    """Within the block, what goes through ``attention`` is appended to ``seen``."""
    if attention is None:
        yield
        return

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(kwargs)
        inputs = args[0] if args else arguments.pop("hidden_states")
        residual = args[1] if len(args) > 1 else 0  # BLOOM's attention adds it
        seen.append(AttentionRun(inputs=inputs, arguments=arguments, output=first(output) - residual))

    hook = attention.register_forward_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def first(output: Any) -> Tensor:
    """The hidden states among what a module gives."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def pass_through(layer: Any, stream: Activations, arguments: dict[str, Any], batch: int) -> None:
    """Moves ``stream`` on to the states after ``layer``."""
    done = 0
    for hidden in stream.split(batch):
        windows = slice(done, done + len(hidden))
        stream[windows] = first(layer(hidden, **with_maps(layer, stream, windows, arguments)))
        done += len(hidden)

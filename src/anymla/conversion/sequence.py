"""Converts a model layer by layer: each one fitted to give the original's output from the converted layers below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.blueprint import AttentionSpec
from anymla.calibration.stream import decoder_layers, layer_inputs, run_layer
from anymla.conversion.step import LayerResult, LayerStep, Split
from anymla.modeling.modeling_anymla import LatentAttention
from anymla.planning.plan import TYPICAL_ROPE_SHARE, LayerPlan
from anymla.recipe import Recipe


@dataclass(frozen=True)
class Converted:
    """Final hidden states [N,T,D] of the held-out windows, original and converted, and the layers."""

    original: Tensor
    converted: Tensor
    attentions: list[LatentAttention]
    results: list[LayerResult]


@torch.no_grad()
def convert_layers(
    model: Any,
    specs: tuple[AttentionSpec, ...],
    plans: tuple[LayerPlan, ...],
    recipe: Recipe,
    windows: Tensor,
    progress: Callable[[int, int, LayerResult], None] | None,
) -> Converted:
    """Replaces every attention module of ``model`` in place; ``windows`` [N,T] are calibration tokens."""
    inputs = layer_inputs(model, windows)
    split = Split.of(len(windows))
    original, converted = inputs.hidden, inputs.hidden.clone()  # both move on layer by layer, in place
    attentions, results = [], []
    share = TYPICAL_ROPE_SHARE
    for index, layer in enumerate(decoder_layers(model)):
        step = LayerStep(layer, specs[index], plans[index], recipe, inputs.arguments[index], split)
        step.measure(index, original, converted)
        attention, result = step.choose(index, share)
        layer.self_attn = attention
        outputs = run_layer(layer, converted, step.arguments, step.batch)
        for part, (_, _, output) in zip(converted.split(step.batch), outputs, strict=True):
            part.copy_(output)
        attentions.append(attention)
        results.append(result)
        share = result.rope_dims / plans[index].cached_numbers  # the next layer's choice lies near this one's
        if progress is not None:
            progress(index + 1, len(plans), result)
    return Converted(original[split.held_out], converted[split.held_out], attentions, results)

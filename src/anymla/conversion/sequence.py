"""Converts a model layer by layer: each one fitted to give the original's output from the converted layers below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.blueprint import Blueprint
from anymla.architectures.families import FAMILIES
from anymla.calibration.stream import LayerCall, decoder_layers, first, layer_inputs
from anymla.conversion.step import LayerResult, LayerStep, Split
from anymla.modeling.latent_attention import LatentAttention
from anymla.planning.plan import TYPICAL_ROPE_SHARE, Plan


@dataclass(frozen=True)
class Converted:
    """Final hidden states [N,T,D] of the held-out windows, original and converted; by layer, what was converted."""

    original: Tensor
    converted: Tensor
    attentions: dict[str, tuple[LatentAttention, dict[str, Any]]]  # by path in the model: the module, its features
    results: list[LayerResult]


@torch.no_grad()
def convert_layers(
    model: Any,
    blueprint: Blueprint,
    plan: Plan,
    windows: Tensor,
    progress: Callable[[int, int, LayerResult], None] | None,
) -> Converted:
    """Replaces every softmax attention module of ``model`` in place; ``windows`` [N,T] are calibration tokens."""
    family, split = FAMILIES[blueprint.text_model_type], Split.of(len(windows))
    inputs = layer_inputs(model, windows, tuples=family.layers_give_tuples)
    original, converted = inputs.hidden, inputs.hidden.clone()  # both move on layer by layer, in place
    done, results = {}, []
    share, layers = TYPICAL_ROPE_SHARE, decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    for index, layer in enumerate(layers):
        call, spec, layer_plan = inputs.calls[index], blueprint.layers[index], plan.layers[index]
        if spec is None or layer_plan is None:
            for hidden in (original, converted):
                _run(layer, hidden, call, 1)
            continue
        step = LayerStep(layer, spec, family, model.config.get_text_config(), layer_plan, plan.recipe, split)
        step.measure(call, index, original, converted)
        attention, result = step.choose(index, share)
        step.install(attention)
        _run(layer, converted, call, step.batch)
        done[f"{names[layer]}.{step.path}"] = (attention, step.source.features)
        results.append(result)
        share = result.rope_dims / layer_plan.cached_numbers  # the next layer's choice lies near this one's
        if progress is not None:
            progress(len(results), len(blueprint.attention_layers), result)
    return Converted(original[split.held_out], converted[split.held_out], done, results)


def _run(layer: Any, hidden: Tensor, call: LayerCall, batch: int) -> None:
    """Moves ``hidden`` on to the states behind ``layer``, in place."""
    for part in hidden.split(batch):
        part.copy_(first(layer(part, *call.args, **call.kwargs)))

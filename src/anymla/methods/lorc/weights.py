"""What LoRC makes of one layer's weights: condition numbers, axes of low rank, the attention.

Shapes: D hidden, G key/value heads of d numbers, n = G d, r rank, P rope pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.methods.base import Survey
from anymla.methods.cache_coding.basis import Basis
from anymla.methods.cache_coding.build import Coded, build_coded
from anymla.methods.cache_coding.rope import frequencies
from anymla.methods.cache_coding.survey import Unheard
from anymla.model_run.stream import LayerBatch
from anymla.modeling.coded_attention import CodedAttention
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.heads import rope_tables

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

ENERGY = 0.999  # share of a matrix' energy that its condition number looks at
LEAST = 1e-6  # of the largest singular value


class ConditionSurvey(Survey):
    """The fact "condition" of a layer: logarithms of the condition numbers of its key and its value weights."""

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: the weights say it all."""
        return Unheard()

    def layer(self, layer: Layer, observed: Unheard) -> dict[str, Any]:
        """The facts of the layer."""
        return {"condition": [log_condition(weight) for weight in key_and_value(_source(layer))]}


class RopeHeard:
    """Listens to the first batch of a layer: ``inv_freq`` [P], angles per position, and ``scale`` of its rope."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.found: tuple[Tensor, float] | None = None

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""
        if self.found is None and batch.attention is not None:
            given, inputs, spec = batch.attention.arguments, batch.attention.inputs, _source(self.layer).spec
            tables, positions = given.get("position_embeddings"), given.get("position_ids")
            cos, sin = rope_tables(spec.rope_table, spec.rope_pairs, tables, positions, inputs, self.layer.config)
            self.found = frequencies(cos[0, 0], sin[0, 0])


def build_low_rank(layer: Layer, spec: CodedSpec, rope: RopeHeard) -> tuple[CodedAttention, float]:
    """The attention of a layer as planned, and the share of its key and value weights' energy that is lost.

    Raises:
        ValueError: the layer was shown no window.
    """
    if rope.found is None:
        raise ValueError(f"layer {layer.index} was shown no window")
    source = _source(layer)
    sides, lost, total = [], 0.0, 0.0
    biases = (source.weights.key_bias * (not source.weights.key_norm), source.weights.value_bias)
    for weight, bias, coding in zip(key_and_value(source), biases, (spec.keys, spec.values), strict=True):
        basis = leading_axes(weight, bias.flatten(), coding.width)
        sides.append(Coded(coding=coding, basis=basis, tables={}))
        lost, total = lost + (basis.energies[coding.width :]).sum().item(), total + basis.energies.sum().item()
    inv_freq, scale = rope.found
    return build_coded(layer, replace(spec, rope_scale=scale), *sides, inv_freq), lost / max(total, 1e-300)


def key_and_value(source: SourceAttention) -> tuple[Tensor, Tensor]:
    """Key and value weights [n,D]; the gain of a norm of keys scales the rows of its weights."""
    weights = source.weights
    return (weights.key * weights.key_gain[:, :, None]).flatten(0, 1), weights.value.flatten(0, 1)


def log_condition(weight: Tensor) -> float:
    """log(s_1 / s_k) of a matrix' singular values, k being the last within ``ENERGY`` of all energy."""
    values: Tensor = torch.linalg.svdvals(weight)
    energy = values.square().cumsum(0)
    last = max(1, int((energy <= ENERGY * energy[-1]).sum()))
    smallest = max(values[last - 1].item(), LEAST * values[0].item(), 1e-300)
    return float((values[0] / smallest).clamp_min(1).log())


def leading_axes(weight: Tensor, mean: Tensor, rank: int) -> Basis:
    """The ``rank`` left singular vectors of ``weight`` [n,D] with the largest values; ``mean`` [n] costs no rank.

    ``energies`` are those of all n axes.
    """
    vectors, values, _ = torch.linalg.svd(weight, full_matrices=False)
    kept = vectors[:, :rank]
    return Basis(mean=mean, encoder=kept, decoder=kept.T, energies=values.square())


def _source(layer: Layer) -> SourceAttention:
    if (spec := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    return read_attention(layer.attention, spec, layer.family, layer.config)

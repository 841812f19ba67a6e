"""What LoRC makes of one layer's weights: axes of low rank, and the attention that caches them.

Shapes: D hidden, G key/value heads of d numbers, n = G d, r rank, P rope pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.methods.cache_coding.basis import Basis
from anymla.methods.cache_coding.build import Coded, build_coded
from anymla.methods.cache_coding.rope import frequencies
from anymla.methods.mla.rank_survey import key_and_value, source_of
from anymla.model_run.stream import LayerBatch
from anymla.modeling.coded_attention import CodedAttention
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.heads import rope_tables

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class RopeHeard:
    """Listens to the first batch of a layer: ``inv_freq`` [P], angles per position, and ``scale`` of its rope."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.inv_freq: Tensor | None = None
        self.scale = 1.0

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""
        if self.inv_freq is None and batch.attention is not None:
            given, inputs, spec = batch.attention.arguments, batch.attention.inputs, source_of(self.layer).spec
            tables, positions = given.get("position_embeddings"), given.get("position_ids")
            cos, sin = rope_tables(spec.rope_table, spec.rope_pairs, tables, positions, inputs, self.layer.config)
            self.inv_freq, self.scale = frequencies(cos[0, 0], sin[0, 0])


def build_low_rank(layer: Layer, spec: CodedSpec, rope: RopeHeard) -> tuple[CodedAttention, float]:
    """The attention of a layer as planned, and the share of its key and value weights' energy that is lost.

    Raises:
        ValueError: the layer was shown no window.
    """
    if rope.inv_freq is None:
        raise ValueError(f"layer {layer.index} was shown no window")
    source = source_of(layer)
    weights, sides = key_and_value(source), []
    biases = source.weights.key_bias * (not source.weights.key_norm), source.weights.value_bias
    for weight, bias, coding in zip(weights, biases, (spec.keys, spec.values), strict=True):
        sides.append(Coded(coding=coding, basis=leading_axes(weight, bias.flatten(), coding.width), tables={}))
    keys, values = sides
    bases = [basis for side in sides if (basis := side.basis) is not None]
    kept = sum(basis.energies[: basis.encoder.shape[1]].sum().item() for basis in bases)
    attention = build_coded(layer, replace(spec, rope_scale=rope.scale), keys, values, rope.inv_freq)
    return attention, 1 - kept / max(sum(basis.energies.sum().item() for basis in bases), 1e-300)


def leading_axes(weight: Tensor, mean: Tensor, rank: int) -> Basis:
    """The ``rank`` left singular vectors of ``weight`` [n,D] with the largest values; ``mean`` [n] costs no rank.

    ``energies`` are those of all n axes.
    """
    energies, vectors = (each.flip(-1) for each in torch.linalg.eigh(weight @ weight.T))
    kept = vectors[:, :rank]
    return Basis(mean=mean, encoder=kept, decoder=kept.T, energies=energies.clamp_min(0))

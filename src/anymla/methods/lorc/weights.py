"""What LoRC makes of one layer's weights: axes of low rank, and the attention that caches them.

Shapes: D hidden, G key/value heads of d numbers, n = G d, r rank, P rope pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention
from anymla.distributed import all_sum
from anymla.methods.cache_coding.basis import Basis
from anymla.methods.cache_coding.build import build_coded
from anymla.methods.cache_coding.coded import Coded
from anymla.methods.cache_coding.rope import frequencies
from anymla.methods.mla.latent import DAMPING
from anymla.methods.mla.rank_survey import key_and_value, source_of
from anymla.model_run.stream import LayerBatch
from anymla.modeling.attention import joined
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.heads import rope_tables
from anymla.modeling.rows_attention import RowsAttention

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class Heard:
    """What a layer tells of itself on random tokens.

    ``inv_freq`` [P]: angles per position; ``scale``: what rope multiplies with; ``grams`` [n,n]: second moments of keys
    before rope and of values, less their biases.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer, self.source = layer, source_of(layer)
        self.inv_freq: Tensor | None = None
        self.scale = 1.0
        weights = key_and_value(self.source)
        self.means = means_of(self.source)
        self.grams = [weight.new_zeros(len(weight), len(weight)) for weight in weights]

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""
        if (run := batch.attention) is None:
            return
        if self.inv_freq is None:
            spec, tables, positions = self.source.spec, *map(run.arguments.get, ("position_embeddings", "position_ids"))
            cos, sin = rope_tables(spec.rope_table, spec.rope_pairs, tables, positions, run.inputs, self.layer.config)
            self.inv_freq, self.scale = frequencies(cos[0, 0], sin[0, 0])
        for gram, mean, states in zip(self.grams, self.means, self.source.project(run.inputs)[1:], strict=True):
            rows = joined(states).flatten(0, 1).double() - mean
            gram += rows.T @ rows


def build_low_rank(layer: Layer, spec: CodedSpec, heard: Heard, axes: str) -> RowsAttention:
    """The attention of a layer as planned, in axes of what was ``heard``, "random", or of the "weights" alone.

    Raises:
        ValueError: the layer got no window.
    """
    if heard.inv_freq is None:
        raise ValueError(f"layer {layer.index} got no window")
    source, sides = source_of(layer), []
    weights, means = key_and_value(source), means_of(source)
    for place, coding in enumerate((spec.keys, spec.values)):
        gram = weights[place] @ weights[place].T
        if axes == "random":
            seen = all_sum(heard.grams[place])
            gram = seen + gram * (DAMPING * seen.trace() / gram.trace().clamp_min(1e-300))
        sides.append(Coded(coding=coding, basis=leading_axes(gram, means[place], coding.width), tables={}))
    return build_coded(layer, replace(spec, rope_scale=heard.scale), sides[0], sides[1], heard.inv_freq)


def means_of(source: SourceAttention) -> tuple[Tensor, Tensor]:
    """Biases [n] of keys and of values, which cost no rank. With a norm there are none of keys."""
    weights = source.weights
    return (weights.key_bias * (not weights.key_norm)).flatten(), weights.value_bias.flatten()


def leading_axes(gram: Tensor, mean: Tensor, rank: int) -> Basis:
    """The ``rank`` first eigenvectors of ``gram`` [n,n]; of W W^T these are the left singular vectors of W."""
    energies, vectors = (each.flip(-1) for each in torch.linalg.eigh(gram))
    kept = vectors[:, :rank]
    return Basis(mean=mean, encoder=kept, decoder=kept.T, energies=energies[:rank])

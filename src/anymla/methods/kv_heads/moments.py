"""What the heads of one attention hold: second moments on calibration text, or of its weights alone.

Shapes: B windows, T tokens, H query heads, G KV heads of d numbers, n = H/G, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.distributed import all_sum, all_sum_number
from anymla.methods.mla.moments import rotate
from anymla.model_run.stream import AttentionRun, LayerBatch
from anymla.modeling.heads import rope_tables

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


@dataclass(frozen=True)
class HeadMoments:
    """E[k k^T] and E[v v^T] of all heads [G,d,G,d], and sum E[q q^T] [G,d,d] over the query heads of each KV head."""

    key: Tensor
    value: Tensor
    query: Tensor

    def ordered(self, order: list[int]) -> HeadMoments:
        """With the KV heads in this order."""
        return HeadMoments(self.key[order][:, :, order], self.value[order][:, :, order], self.query[order])


def weight_moments(source: SourceAttention) -> HeadMoments:
    """As they are where x is white noise: of weights and biases alone."""
    w = source.weights
    query, key, value = (
        torch.cat([weight, bias[..., None]], -1)
        for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
    )
    key, value = (torch.einsum("gdx,hex->gdhe", rows, rows) for rows in (key, value))
    query = query.unflatten(0, (len(key), -1))
    return HeadMoments(key, value, torch.einsum("gndx,gnex->gde", query, query))


class HeadSums:
    """Sums moments while the original layer runs, of queries and keys before rope, or after it where ``rotated``.

    Biases are in them, and means are not taken off: what is shared has no constant of its own.
    """

    def __init__(self, layer: Layer, *, rotated: bool) -> None:
        if (spec := layer.old.attention) is None:
            raise ValueError(f"layer {layer.index} has no softmax attention")
        self.layer, self.rotated = layer, rotated
        self.source = read_attention(layer.attention, spec, layer.family, layer.config)
        kv_heads, size, device = spec.num_kv_heads, spec.head_dim, layer.original.device
        self.key, self.value = (
            torch.zeros(kv_heads, size, kv_heads, size, dtype=torch.float64, device=device) for _ in range(2)
        )
        self.query = torch.zeros(kv_heads, size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, batch: LayerBatch) -> None:
        """Takes one batch of the original's stream; those that are held out are left out."""
        if (run := batch.attention) is None:
            raise ValueError(f"layer {self.layer.index}: its attention did not run")
        inputs = run.inputs[: max(0, self.layer.windows.held_out.start - batch.windows.start)]
        if not len(inputs):
            return
        query, key, value = (states.double() for states in self._states(inputs, run))
        self.key += torch.einsum("bgtd,bhte->gdhe", key, key)
        self.value += torch.einsum("bgtd,bhte->gdhe", value, value)
        grouped = query.unflatten(1, (key.shape[1], -1))
        self.query += torch.einsum("bgntd,bgnte->gde", grouped, grouped)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    def _states(self, inputs: Tensor, run: AttentionRun) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.source.project(inputs)
        spec = self.source.spec
        if self.rotated and spec.rope_pairs:
            given = run.arguments.get("position_embeddings"), run.arguments.get("position_ids")
            cos, sin = rope_tables(spec.rope_table, spec.rope_pairs, *given, inputs, self.layer.config)
            turn = torch.complex(cos.double(), sin.double())
            query, key = (rotate(states.double(), turn) for states in (query, key))
        if self.rotated and (gain := self.source.weights.query_gain) is not None:
            query = query.double() * gain
        return query, key, value

    def moments(self) -> HeadMoments:
        """The means over all processes."""
        tokens = all_sum_number(self.tokens, self.key.device)
        return HeadMoments(*(all_sum(each) / tokens for each in (self.key, self.value, self.query)))


class Unheard:
    """An observer of a layer whose weights say it all."""

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""

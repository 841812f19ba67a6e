"""Which head of a shared layer attends by which head's map of its source: the assignment that costs least.

Heads have no order that two layers agree on. What a head loses is the change of its output, W_o included, when it
attends by the other map. Heads that share keys and values stay together: groups are assigned, and heads in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.distributed import all_sum
from anymla.methods.shared_attention.build import build_sharing, read_layer
from anymla.model_run.maps import WindowMaps
from anymla.modeling.absorbed import additive_mask
from anymla.modeling.exact_window import heads_product
from anymla.modeling.heads import attention_weights, causal_mask
from anymla.modeling.shared_attention import MAPS, AttentionMap, AttentionMaps, MapSourceAttention
from anymla.modeling.shared_spec import SharedSpec

if TYPE_CHECKING:
    from anymla.model_run.stream import LayerBatch
    from anymla.sweep.layer import Layer


class HeadCosts:
    """Squared errors [H,H] of the layer's output: of each of its heads by each head's map of layer ``source``."""

    def __init__(self, layer: Layer, source: int) -> None:
        self.layer, self.source = layer, source
        self.attention: Any = build_sharing(layer, SharedSpec())
        output = read_layer(layer).weights.output
        self.gram = torch.einsum("Dhd,Dhe->hde", output, output)
        self.costs = torch.zeros(output.shape[1], output.shape[1], dtype=torch.float64, device=output.device)

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""
        if (run := batch.attention) is None:
            return
        own, attention = AttentionMaps(), self.attention
        attention(run.inputs, **run.arguments | {MAPS: own})
        mine = dense_map(own.take(attention.layer_idx), attention)
        other = dense_map(WindowMaps(self.layer.converted, batch.windows, attention).take(self.source), attention)
        values = attention.true_value(run.inputs).double()
        true = heads_product(mine, values.mT)  # [B,H,T,d]
        for group, value in enumerate(values.unbind(1)):
            by_map = other @ value[:, None]  # by the map of every head of the source
            size = attention.num_key_value_groups
            for head in range(group * size, (group + 1) * size):
                change = by_map - true[:, head : head + 1]
                self.costs[head] += torch.einsum("bstd,de,bste->s", change, self.gram[head], change)

    def order(self) -> list[int]:
        """The head [H] of this layer that attends by each map of the source."""
        costs = all_sum(self.costs)
        groups = self.attention.num_kv_heads
        blocks = costs.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).transpose(1, 2)  # [own, other, n, n]
        inner = [[assigned(block.tolist()) for block in row] for row in blocks]
        sums = [
            [block[range(len(places)), places].sum().item() for block, places in zip(*row, strict=True)]
            for row in zip(blocks, inner, strict=True)
        ]
        order, size = [0] * len(costs), len(costs) // groups
        for own, other in enumerate(assigned(sums)):
            for head, place in enumerate(inner[own][other]):
                order[other * size + place] = own * size + head
        return order


def dense_map(made: AttentionMap, attention: MapSourceAttention) -> Tensor:
    """The probabilities [B,H,T,S] of a map of a whole text, float64."""
    length = made.query.shape[2]
    mask = causal_mask(length, length, attention.sliding_window, made.query.device)
    scores = heads_product(made.query.double() * attention.scaling, made.key.double())
    return attention_weights(scores, additive_mask(mask, scores.dtype), attention.spec.softcap, None)


def assigned(costs: list[list[float]]) -> list[int]:
    """The column [n] of each row of a square matrix such that all differ and their sum is smallest.

    The Hungarian method with potentials, O(n^3).
    """
    size = len(costs)
    rows, columns = [0.0] * size, [0.0] * (size + 1)
    owner = [-1] * (size + 1)  # the row of each column; the last one is where a search begins
    for row in range(size):
        _augment(costs, row, rows, columns, owner)
    return sorted(range(size), key=lambda column: owner[column])


def _augment(costs: list[list[float]], row: int, rows: list[float], columns: list[float], owner: list[int]) -> None:
    """Gives ``row`` a column, and the rows before it other ones where that costs less."""
    size = len(rows)
    column, owner[size] = size, row
    least, way, free = [float("inf")] * size, [size] * size, set(range(size))
    while owner[column] >= 0:
        held = owner[column]
        for other in free:
            if (left := costs[held][other] - rows[held] - columns[other]) < least[other]:
                least[other], way[other] = left, column
        following = min(free, key=lambda other: (least[other], other))
        step = least[following]
        for other in {*range(size + 1)} - free:
            if other == size or owner[other] >= 0:
                rows[owner[other]] += step
                columns[other] -= step
        for other in free:
            least[other] -= step
        column = following
        free.discard(column)
    while column != size:
        owner[column], column = owner[way[column]], way[column]

"""How fast rope turns each pair, told from the tables that a family hands to its attention."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from anymla.modeling.attention import ConvertedAttention
from anymla.modeling.heads import rope_tables


class RopeSeen:
    """Listens to the first call of ``attention``; ``found`` is then what :func:`frequencies` says of its rope."""

    def __init__(self, attention: ConvertedAttention) -> None:
        self.found: tuple[Tensor, float] | None = None
        self.hook = attention.register_forward_pre_hook(self._listen, with_kwargs=True)

    def _listen(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        tables, positions = given.get("position_embeddings"), given.get("position_ids")
        spec, hidden = attention.spec, given["hidden_states"].detach()
        cos, sin = rope_tables(spec.rope_table, spec.rope_pairs, tables, positions, hidden, attention.config)
        self.found = frequencies(cos[0, 0], sin[0, 0])
        self.hook.remove()


def frequencies(cos: Tensor, sin: Tensor) -> tuple[Tensor, float]:
    """Angles per position [P], float64, and what rope multiplies pairs with beside turning them.

    The angle at position 1 says it roughly, those at 2, 4, 8, .. ever finer.

    ``cos`` and ``sin`` are those of positions 0 to T - 1 [T,P], T at least 2, in float32 or finer. No pair turns by
    half a circle or more per position.
    """
    turned = torch.complex(cos.double(), sin.double())
    scale = turned[0].abs().mean().item() if cos.shape[1] else 1.0
    angle, position = turned[1].angle(), 2
    while position < len(turned):
        measured = turned[position].angle()
        rounds = ((angle * position - measured) / (2 * math.pi)).round()
        angle = (measured + 2 * math.pi * rounds) / position
        position *= 2
    return angle, round(scale, 6)

"""Attention with fewer KV heads in its cache than it has keys before rope.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads in N groups of t, d head_dim.
Cached per token and layer: keys [N, d], or [N, t d] where all of them are kept, and values [N, d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .arguments import make_fit
from .attention import ConvertedAttention
from .heads import score_bias
from .spec import LayerSpec


class GroupedAttention(ConvertedAttention):
    """Attention of which the heads of a group share values, and, compressed after rope, keys.

    What a group's heads read of what they share is folded into the output projection for values; for keys it is put
    on the rotated queries.
    """

    key_encoder: nn.Parameter | None
    key_decoder: nn.Parameter | None

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        if (grouped := spec.grouped) is None:
            raise ValueError(f"the layer at {spec.module} has no grouped cache")
        heads, size = self.num_kv_heads, self.head_dim
        self.cached_heads, self.members = grouped.kv_heads, heads // grouped.kv_heads
        self.k_proj = nn.Linear(hidden, heads * size)
        self.v_proj = nn.Linear(hidden, grouped.kv_heads * size)
        encoder, decoder = (grouped.kv_heads, size, self.members * size), (heads, size, size)
        self.key_encoder = nn.Parameter(torch.zeros(encoder)) if grouped.shares_keys else None
        self.key_decoder = nn.Parameter(torch.zeros(decoder)) if grouped.shares_keys else None
        self.num_key_value_groups = self.num_heads // (grouped.kv_heads if grouped.shares_keys else heads)

    def _make_buffers(self, spec: LayerSpec) -> None:
        """None."""

    def queries(self, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What keys are multiplied by [B,H,T,d]."""
        query = self.rotated(query, cos, sin)
        if self.query_gain is not None:
            query = query * self.query_gain
        if self.key_decoder is None:
            return query
        return (query.unflatten(1, (self.num_kv_heads, -1)) @ self.key_decoder.unsqueeze(1)).flatten(1, 2)

    def compress(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps of the new tokens: keys [B,N,T,d or t d], values [B,N,T,d]."""
        keys = self.rotated(self.true_key(hidden_states), cos, sin)
        keys = keys.unflatten(1, (self.cached_heads, -1)).transpose(2, 3).flatten(3)  # [B,N,T,t d]
        if self.key_encoder is not None:
            keys = keys @ self.key_encoder.mT
        return keys, self.true_value(hidden_states)

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        places: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new tokens into the cache and attends to all of it; returns [B,T,H,d] and the weights."""
        query = self.queries(query, *places)
        key, value = self.compress(hidden_states, *places)
        if cache is not None:
            make_fit(cache, self.layer_idx, key, value)
            key, value = cache.update(key, value, self.layer_idx)
        if self.key_encoder is None:  # each head's own keys, and the values that it shares
            key = key.unflatten(-1, (self.members, -1)).transpose(2, 3).flatten(1, 2)
            value = value.repeat_interleave(self.members, dim=1)
        mask = score_bias(mask, self.spec, self.config, hidden_states, key.shape[-2], kwargs)
        return self.attend_as_stock(query, key, value, mask, kwargs)

"""Latent attention that hands its attention map on, and a latent of values alone that is weighted by such a map.

One of the modelling files that travel with every converted checkpoint. It needs only torch and transformers. A layer
that uses another's map caches the latent of its values [r], and neither rope key nor anything else of keys. It has
v_a_proj [r,D], v_b_proj [G d,r], o_proj [D,H d]. If values are not linear in x, v_proj [G d,D] comes first and v_a_proj
is [r,G d].

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, d head_dim, R rope dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .absorbed import additive_mask
from .attention import joined
from .block_maps import grouped
from .dense_weight import dense_weight
from .exact_window import heads_product
from .heads import attention_weights
from .latent_attention import LatentAttention
from .shared_attention import MAPS, AttentionMap, SharedAttention, attend_by
from .spec import LayerSpec


class MapSourceLatentAttention(LatentAttention):
    """Latent attention that hands its map on: for one new token its row of probabilities, else queries and keys."""

    def attend_cached(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attends and hands the map on; returns [B,T,H,d] and the weights."""
        maps, kwargs = kwargs.get(MAPS), {name: value for name, value in kwargs.items() if name != MAPS}
        weights: Tensor | None = None
        if (up := self._up(query_nope, mask)) is None:
            key, value = self.expand_kv(latent, rope_key)
            made = AttentionMap(torch.cat([query_nope, query_rope], dim=-1), key)
            output, weights = attend_by(made, self, value, mask, kwargs)
        else:
            row = self._row(self.into_latent(query_nope, up[0]), query_rope, latent, rope_key, mask)
            made = AttentionMap(query_nope, latent, row)
            output = self.out_of_latent(heads_product(row, latent.mT), up[1]).transpose(1, 2)
        if maps is not None:
            maps.put(self.layer_idx, made)
        return output, weights

    def _up(self, query: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """W_uk and W_uv where a single token reads the latent as it is; None where keys and values are rebuilt."""
        if query.shape[2] > 1 or self.training or not self.absorbs(1, mask):
            return None
        return self.up_projections(query)

    def _row(
        self, query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What one new token attends to [B,H,1,S]."""
        scores = heads_product(query_latent * self.scaling, latent) + heads_product(query_rope * self.scaling, rope_key)
        mask = None if mask is None else additive_mask(mask, scores.dtype)
        return attention_weights(scores, mask, self.spec.softcap, self.sinks)


class SharedLatentAttention(SharedAttention):
    """A latent of values, weighted by the attention map of ``source_layer``."""

    def _make_projections(self, hidden: int, spec: LayerSpec) -> None:
        attention, latent = spec.parts
        values, gate = attention.num_kv_heads * attention.head_dim, attention.gate
        if spec.makes_values:
            self.v_proj = nn.Linear(hidden, values)
        self.v_a_proj = nn.Linear(values if spec.makes_values else hidden, latent.kv_lora_rank, bias=latent.biases)
        self.v_b_proj = nn.Linear(latent.kv_lora_rank, values, bias=False)
        self.gate_proj = nn.Linear(hidden, gate) if gate else None
        self.o_proj = nn.Linear(attention.num_heads * attention.head_dim, hidden, bias=latent.biases)

    def cached_value(self, hidden_states: Tensor) -> Tensor:
        """What the cache keeps of the new tokens: the latent of their values [B,1,T,r]."""
        values = joined(self.true_value(hidden_states)) if self.layer_spec.makes_values else hidden_states
        latent: Tensor = self.v_a_proj(values)
        return latent.unsqueeze(1)

    def weighted(
        self, made: AttentionMap, cached: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The latents [B,1,S,r], or the values made of them, weighted by a map; returns [B,T,H,d] and the weights."""
        row, up = made.weights, None
        if row is not None and not self.always_expands:
            up = dense_weight(self.v_b_proj, cached.shape[-1], cached)
        if row is None or up is None:
            value = self.v_b_proj(cached.squeeze(1)).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
            return attend_by(made, self, value, mask, kwargs)
        heads = up.unflatten(0, (self.num_kv_heads, -1)).mT[None]  # [1,G,r,d]
        return grouped(heads_product(row, cached.mT), heads).transpose(1, 2), None

"""Multi-head latent attention with free rope channels.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, d head_dim, P rope pairs
(d/2, fewer where rope turns a part of the head only), K rope channels (R = 2K numbers), r latent rank. Cached per token
and layer: latent [r] and rope key [R]. A vector of pairs is stored half-split, [real parts | imaginary parts]; a head
is [pairs | dims without rope], whatever order its family has: the conversion permutes the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .absorbed import absorbed_attention
from .arguments import make_fit
from .attention import ConvertedAttention, joined
from .dense_weight import dense_weight, is_plain
from .heads import multiply_pairs, score_bias
from .spec import LayerSpec


class LatentAttention(ConvertedAttention):
    """Multi-head latent attention that stands in for the attention module ``original`` of one layer.

    Keys and values are rebuilt per key/value head, so GQA stays GQA.
    """

    query_rotation: Tensor
    channel_weight: Tensor
    channel_index: Tensor

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        _, latent = spec.parts
        self.kv_lora_rank, self.qk_rope_head_dim = latent.kv_lora_rank, latent.qk_rope_head_dim
        self.channel_fold = latent.channel_fold
        self._make_encoders(hidden, spec, latent.biases)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, 2 * self.num_kv_heads * self.head_dim, bias=False)

    def _make_encoders(self, hidden: int, spec: LayerSpec, biases: bool) -> None:
        """Makes what makes latent and rope key."""
        keys, cached = self.num_kv_heads * self.head_dim, self.kv_lora_rank + self.qk_rope_head_dim
        if self.spec.linear_keys:
            self.kv_a_proj_with_mqa = nn.Linear(hidden, cached, bias=biases)
        else:  # something not linear stands between x and the cache: encode the true keys and values
            self.k_proj = nn.Linear(hidden, keys)
            self.k_a_proj_with_mqa = nn.Linear(keys, cached, bias=False)
            self.v_a_proj = nn.Linear(keys if spec.makes_values else hidden, self.kv_lora_rank)
            if spec.makes_values:
                self.v_proj = nn.Linear(hidden, keys)

    def _biases(self, spec: LayerSpec) -> bool:
        return spec.parts[1].biases

    def _make_buffers(self, spec: LayerSpec) -> None:
        """What rotates queries in expectation, and what reads the channels."""
        reads = self.qk_rope_head_dim // 2 * self.channel_fold
        ones = torch.ones(self.num_heads, self.rope_pairs)
        self.register_buffer("query_rotation", torch.stack([ones, torch.zeros_like(ones)]))
        self.register_buffer("channel_weight", torch.zeros(2, self.num_kv_heads, reads))
        self.register_buffer("channel_index", torch.zeros(reads, dtype=torch.long))

    @property
    def channel_frequency(self) -> Tensor:
        """The rope pair [K] with whose frequency each channel rotates."""
        return self.channel_index[: self.qk_rope_head_dim // 2]

    def queries(self, query: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free query [B,H,T,d] (expected rotation applied) and channel query [B,H,T,R].

        ``angles``: cos and sin [..,T,P] that rotate the channel query; none: it is not rotated.
        """
        pairs, rest = query.split([2 * self.rope_pairs, self.head_dim - 2 * self.rope_pairs], dim=-1)
        real, imag = self.query_rotation.unsqueeze(-2)
        query_nope = torch.cat([multiply_pairs(pairs, real, imag), rest], dim=-1)
        frequency = self.channel_frequency.repeat(self.channel_fold)
        dims = torch.cat([self.channel_index, self.channel_index + self.rope_pairs])
        channels = query[..., dims]
        if angles:
            channels = multiply_pairs(channels, *(table[..., frequency] for table in angles))
        if self.query_gain is not None:
            channels = channels * self.query_gain[dims]
        weight = self.channel_weight.repeat_interleave(self.num_key_value_groups, dim=1).unsqueeze(-2)
        channels = multiply_pairs(channels, weight[0], weight[1])
        if self.channel_fold > 1:
            channels = channels.unflatten(-1, (2, self.channel_fold, -1)).sum(-2).flatten(-2)
        return query_nope, channels

    def encoded(self, hidden_states: Tensor, true_kv: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Latent [B,T,r] and rope key [B,T,R] of the new tokens, before rope.

        ``true_kv``: the original's keys and values, where they were made already.
        """
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        if self.spec.linear_keys:
            latent, rope_key = self.kv_a_proj_with_mqa(hidden_states).split(sizes, dim=-1)
            return latent, rope_key
        key = self.true_key(hidden_states) if true_kv is None else true_kv[0]
        latent, rope_key = self.k_a_proj_with_mqa(joined(key)).split(sizes, dim=-1)
        return latent + self.v_a_proj(self._value_source(hidden_states, true_kv)), rope_key

    def compress(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, true_kv: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the cache keeps of the new tokens: latent [B,1,T,r] and rotated rope key [B,1,T,R]."""
        latent, rope_key = self.encoded(hidden_states, true_kv)
        return latent.unsqueeze(1), self.rotated_channels(rope_key.unsqueeze(1), cos, sin)

    def rotated_channels(self, channels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Channels [..,T,R] of queries or of the rope key, each turned by its own angle of cos and sin [..,T,P]."""
        return multiply_pairs(channels, cos[..., self.channel_frequency], sin[..., self.channel_frequency])

    def _value_source(self, hidden_states: Tensor, true_kv: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the latent's part for values is linear in: the true values [B,T,G d], or x."""
        if true_kv is not None:
            return joined(true_kv[1])
        return joined(self.true_value(hidden_states)) if self.layer_spec.makes_values else hidden_states

    def expand_kv(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuilds key [B,G,S,d+R] and value [B,G,S,d] of every key/value head from the cached [B,1,S,r], [B,1,S,R]."""
        expanded: Tensor = self.kv_b_proj(kv_c.squeeze(1))
        expanded = expanded.view(*expanded.shape[:-1], -1, 2, self.head_dim)
        key_nope, value = expanded.permute(3, 0, 2, 1, 4).unbind()
        return torch.cat([key_nope, k_pe.expand(-1, key_nope.shape[1], -1, -1)], dim=-1), value

    def up_projections(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """W_uk and W_uv [G,d,r], in the dtype of ``like``; None where an adapter makes them no matrices."""
        weight = dense_weight(self.kv_b_proj, self.kv_lora_rank, like)
        if weight is None:
            return None
        up_key, up_value = weight.unflatten(0, (-1, 2, self.head_dim)).unbind(1)
        return up_key, up_value

    def attend_absorbed(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        up: tuple[Tensor, Tensor],
    ) -> Tensor:
        """W_uk moves to the query and W_uv after the attention (``up``: both); returns [B,T,H,d]."""
        key, value = self.key_and_value(latent)
        cached = (key, rope_key, mask, self.scaling)
        query_latent = self.into_latent(query_nope, up[0])
        softcap, sinks = self.spec.softcap, self.sinks
        context, _ = absorbed_attention(query_latent, query_rope, *cached, value=value, softcap=softcap, sinks=sinks)
        return self.out_of_latent(context, up[1]).transpose(1, 2)

    def key_and_value(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What absorbed queries and outputs read of a latent [B,1,S,r]: all of it."""
        return latent, latent

    def into_latent(self, query_nope: Tensor, up_key: Tensor) -> Tensor:
        """The position-free query [B,H,T,d] times W_uk [G,d,r]: [B,H,T,r]."""
        groups = query_nope.reshape(len(query_nope), len(up_key), -1, self.head_dim)
        return (groups @ up_key).view(*query_nope.shape[:3], -1)

    def out_of_latent(self, context: Tensor, up_value: Tensor) -> Tensor:
        """Attention over latents [B,H,T,r] times W_uv [G,d,r]: [B,H,T,d]."""
        groups = context.reshape(len(context), len(up_value), -1, self.kv_lora_rank)
        return (groups @ up_value.mT).view(*context.shape[:3], -1)

    def attend_expanded(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Rebuilds keys and values and calls the attention that the config names; returns [B,T,H,d] and the weights."""
        key, value = self.expand_kv(latent, rope_key)
        return self.attend_as_stock(torch.cat([query_nope, query_rope], dim=-1), key, value, mask, kwargs)

    def absorbs(self, new: int, mask: Tensor | None) -> bool:
        """Whether latent space takes fewer multiply-adds than expanding the cache, and the mask allows it."""
        if self.always_expands:
            return False
        if self.training and (self.attention_dropout > 0 or not is_plain(self.kv_b_proj)):  # adapters drop out, too
            return False
        if not (mask is None and new == 1) and not (isinstance(mask, Tensor) and mask.dim() == 4):
            return False
        keys, rank = self.num_kv_heads * self.head_dim, self.kv_lora_rank
        return new == 1 or new * self.num_heads * (rank - self.head_dim) < keys * rank

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
        query_nope, query_rope = self.queries(query, *places)
        latent, rope_key = self.compress(hidden_states, *places)
        if cache is not None:
            make_fit(cache, self.layer_idx, latent, rope_key)
            latent, rope_key = cache.update(latent, rope_key, self.layer_idx)
        mask = score_bias(mask, self.spec, self.config, hidden_states, latent.shape[-2], kwargs)
        return self.attend_cached(query_nope, query_rope, latent, rope_key, mask, kwargs)

    def attend_cached(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to a latent and a rope key in the way that costs less; returns [B,T,H,d] and the weights."""
        inputs = (query_nope, query_rope, latent, rope_key, mask)
        if self.absorbs(query_nope.shape[2], mask) and (up := self.up_projections(query_nope)) is not None:
            return self.attend_absorbed(*inputs, up), None
        return self.attend_expanded(*inputs, **kwargs)

"""Multi-head latent attention in the one form that vLLM's transformers backend turns into its own MLA attention.

One of the modelling files that travel with a vLLM export. It needs only torch and transformers. vLLM reads the source
of ``FusedAttention.forward`` (vllm/model_executor/models/transformers/fusers/mla.py). It looks for:

- one chain norm(linear(input)), and another linear of an input for the query
- keys and values made in one method with two arguments that names kv_b_proj
- the attention taken from ALL_ATTENTION_FUNCTIONS

FamilyAttention has what families do around it.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, d head_dim of the family,
P rope pairs, N and V width of a head's position-free key and of its value, K rope channels (R = 2K), r latent rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .arguments import make_fit, take_cache
from .heads import multiply_pairs, rope_tables, split_heads
from .spec import LayerSpec


class LatentRMSNorm(nn.Module):
    """An RMSNorm that changes nothing: every engine has one here, and a converted latent has none.

    With e = 4^k and w = 2^k, x (mean(x^2) + e)^{-1/2} w is x itself, bit by bit. That holds as long as mean(x^2) is
    negligible beside 4^k in the precision at hand.
    """

    def __init__(self, size: int, exponent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 2.0**exponent))
        self.variance_epsilon = 4.0**exponent

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., size] to the same."""
        input_dtype = hidden_states.dtype
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(input_dtype)


class QueryHeads(nn.Module):
    """The projected query [B,T,..] as heads [B,H,T,N+R]; ``norm`` and ``clip`` come first, then ``maps`` [H,N+R,d].

    If a family has neither norm nor clip, the maps are part of the projection.
    """

    def __init__(self, width: int, norm: Any, options: dict[str, Any], maps: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.width, self.options = width, options
        self.norm = norm
        self.maps = None if maps is None else nn.Parameter(torch.zeros(maps))

    def forward(self, query: Tensor) -> Tensor:
        """[B,T,H width] to [B,H,T,N+R]."""
        heads = split_heads(query, self.width, norm=self.norm, **self.options)
        return heads if self.maps is None else heads @ self.maps.mT


class FusedAttention(nn.Module):
    """Nothing but latent attention: ``encoded`` is what its keys and values are linear in."""

    def __init__(
        self, config: Any, layer_idx: int, queries: QueryHeads, query: int, encoded: int, scaling: float
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.is_causal = config, layer_idx, scaling, True
        self.num_heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.kv_lora_rank, self.qk_rope_head_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = config.qk_nope_head_dim, config.v_head_dim
        cached, expanded = self.kv_lora_rank + self.qk_rope_head_dim, self.qk_nope_head_dim + self.v_head_dim
        self.q_proj = nn.Linear(config.hidden_size, query)
        self.query_heads = queries
        self.kv_a_proj_with_mqa = nn.Linear(encoded, cached)
        self.kv_a_layernorm = LatentRMSNorm(self.kv_lora_rank, config.latent_norm_exponent)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, self.num_heads * expanded, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, config.hidden_size)

    def expand_kv(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Key [B,H,S,N+R] and value [B,H,S,V] of every head from the cached [B,1,S,r] and [B,1,S,R]."""
        expanded = self.kv_b_proj(kv_c.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([key, k_pe.expand(-1, self.num_heads, -1, -1)], dim=-1), value

    def forward(
        self,
        hidden_states: Tensor,
        encoded: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` [B,T,D], cos and sin [B,1,T,K] of the layer's channels; returns [B,T,D] and the weights."""
        query_nope, query_rope = self.query_heads(self.q_proj(hidden_states)).split(
            [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1
        )
        latent, rope_key = self.kv_a_proj_with_mqa(encoded).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_c = self.kv_a_layernorm(latent).unsqueeze(1)
        k_pe = multiply_pairs(rope_key.unsqueeze(1), cos, sin)
        query = torch.cat([query_nope, multiply_pairs(query_rope, cos, sin)], dim=-1)
        if past_key_values is not None:
            kv_c, k_pe = past_key_values.update(kv_c, k_pe, self.layer_idx)
        key, value = self.expand_kv(kv_c, k_pe)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class FamilyAttention(nn.Module):
    """Stands in for the attention module ``original``: what its family does to keys and positions, then the attention.

    ``layer``: the converted layer's spec. Where a norm or a clip stands between projection and key, the true keys (and
    values) are made here, and the latent is linear in them. ``channel_select`` [P,K] has a one where a channel rotates
    with a pair's frequency.
    """

    def __init__(self, original: Any, config: Any, layer: LayerSpec) -> None:
        super().__init__()
        spec, _ = layer.parts
        self.config, self.rope_table, self.rope_pairs = config, spec.rope_table, spec.rope_pairs
        layer_idx = original.layer_idx if hasattr(original, "layer_idx") else original.layer_id
        self.head_dim = spec.head_dim
        self.options: dict[str, Any] = {"clip": spec.clip, "norm_over": spec.norm_over}
        names = spec.norms or (None, None)
        q_norm, self.key_norm = (None if name is None else getattr(original, name) for name in names)
        self.value_norm = None if spec.value_norm is None else getattr(original, spec.value_norm)
        encoded, keys = config.hidden_size, spec.num_kv_heads * self.head_dim
        if not spec.linear_keys:
            self.key_proj = nn.Linear(config.hidden_size, keys)
            self.value_proj = nn.Linear(config.hidden_size, keys) if layer.makes_values else None
            encoded = keys + (keys if layer.makes_values else config.hidden_size)
        heads, width = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        direct = spec.linear_queries
        maps = None if direct else (heads, width, self.head_dim)
        query = width if direct else self.head_dim
        queries = QueryHeads(query, q_norm, self.options, maps)
        self.mla = FusedAttention(config, layer_idx, queries, heads * query, encoded, spec.scaling)
        self.channel_select = nn.Parameter(torch.zeros(self.rope_pairs, config.qk_rope_head_dim // 2))

    def encode(self, hidden_states: Tensor) -> Tensor:
        """The true keys, and the true values or else what they are linear in: [B,T,G d + (G d or D)]."""
        key = split_heads(self.key_proj(hidden_states), self.head_dim, norm=self.key_norm, **self.options)
        value = hidden_states
        if self.value_proj is not None:
            value = split_heads(self.value_proj(hidden_states), self.head_dim, norm=self.value_norm, **self.options)
            value = value.transpose(1, 2).flatten(2)
        return torch.cat([key.transpose(1, 2).flatten(2), value], dim=-1)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over ``hidden_states`` [B,T,D] and the cache, as the layers of transformers call it.

        Raises:
            TypeError: an argument that holds a cache or a tensor is not known (arguments.py).
        """
        cache = take_cache(kwargs)
        if cache is not None:
            widths = (self.mla.kv_lora_rank, self.mla.qk_rope_head_dim)
            like = [hidden_states.new_empty(len(hidden_states), 1, 0, width) for width in widths]
            make_fit(cache, self.mla.layer_idx, *like)
        cos, sin = rope_tables(
            self.rope_table, self.rope_pairs, position_embeddings, position_ids, hidden_states, self.config
        )
        cos, sin = cos @ self.channel_select, sin @ self.channel_select
        encoded = self.encode(hidden_states) if hasattr(self, "key_proj") else hidden_states
        return self.mla(hidden_states, encoded, cos, sin, attention_mask, cache, **kwargs)

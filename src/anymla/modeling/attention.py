"""What every attention does that stands in for a stock one, whatever its cache holds.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, N heads, d head_dim, P rope
pairs. A head is [real parts of the pairs | imaginary parts | dims without rope], whatever order its family has: the
conversion permutes the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .absorbed import additive_mask
from .arguments import take_cache
from .heads import (
    attention_weights,
    causal_mask,
    dropout_rates,
    multiply_pairs,
    query_temperature,
    rope_tables,
    split_heads,
    taken,
    window_of,
)
from .spec import LayerSpec


class ConvertedAttention(nn.Module):
    """Stands in for the attention module ``original`` of one layer; norms are taken over from it.

    Args:
        original: the stock module, possibly on the meta device.
        config: the language model's config.
        spec: what the original computes, and what the cache holds instead of its keys and values.
    """

    always_expands = False  # set while a model learns: fused kernels hold no scores for the way back
    k_proj: nn.Module
    v_proj: nn.Module
    query_gain: Tensor | None

    def __init__(self, original: Any, config: Any, spec: LayerSpec) -> None:
        super().__init__()
        if (attention := spec.replaced) is None:
            raise ValueError(f"the layer at {spec.module} is not converted")
        self.layer_spec, self.spec, self.config = spec, attention, config
        self.is_causal = bool(getattr(original, "is_causal", True))  # PaliGemma's is not
        self.layer_idx: int = original.layer_idx if hasattr(original, "layer_idx") else original.layer_id
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.num_key_value_groups = attention.num_heads // attention.num_kv_heads
        self.head_dim, self.rope_pairs, self.scaling = attention.head_dim, attention.rope_pairs, attention.scaling
        self.attention_dropout, self.output_dropout = dropout_rates(original)
        self.sliding_window = window_of(original, config, self.layer_idx)

        own = isinstance(original, ConvertedAttention)  # which is converted further
        norms = ("q_norm", "k_norm") if own and attention.norms else attention.norms
        self.q_norm, self.k_norm = (taken(original, name) for name in norms or (None, None))
        self.v_norm = taken(original, "v_norm" if own and attention.value_norm else attention.value_norm)
        self.output_norm = taken(original, "output_norm" if own and attention.output_norm else attention.output_norm)
        self._make_projections(config.hidden_size, spec)
        self.sinks = nn.Parameter(torch.zeros(attention.num_heads)) if attention.sinks else None
        self._make_buffers(spec)
        self.register_buffer("query_gain", torch.ones(self.head_dim) if attention.query_gain else None)

    def _make_projections(self, hidden: int, spec: LayerSpec) -> None:
        queries, biases, gate = self.num_heads * self.head_dim, self._biases(spec), self.spec.gate
        self.q_proj = nn.Linear(hidden, queries, bias=biases)
        self._make_cached(hidden, spec)
        self.gate_proj = nn.Linear(hidden, gate) if gate else None
        self.o_proj = nn.Linear(queries, hidden, bias=biases)

    def _biases(self, spec: LayerSpec) -> bool:
        """Whether the projections of queries and output have biases."""
        return True

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        """Makes what goes into the cache, and what reads it."""
        raise NotImplementedError

    def _make_buffers(self, spec: LayerSpec) -> None:
        """Registers what no gradient changes."""
        raise NotImplementedError

    def true_query(self, hidden_states: Tensor, positions: Any) -> Tensor:
        """The original's query [B,H,T,d]: norm applied, rope not yet."""
        query = self._heads(self.q_proj(hidden_states), self.q_norm)
        if self.spec.temperature is not None:
            query = query * query_temperature(positions, self.spec.temperature).to(query.dtype)
        return query

    def true_key(self, hidden_states: Tensor) -> Tensor:
        """What ``k_proj`` makes, as heads [B,G,T,d]: the original's keys before rope, in layers that have them."""
        return self._heads(self.k_proj(hidden_states), self.k_norm)

    def true_value(self, hidden_states: Tensor) -> Tensor:
        """What ``v_proj`` makes, as heads [B,G,T,d]: the original's values, in layers that have them."""
        return self._heads(self.v_proj(hidden_states), self.v_norm)

    def rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """True queries or keys [B,N,T,d] with the original's rope."""
        pairs, rest = heads.split([2 * self.rope_pairs, self.head_dim - 2 * self.rope_pairs], dim=-1)
        return torch.cat([multiply_pairs(pairs, cos, sin), rest], dim=-1)

    def _heads(self, states: Tensor, norm: Any) -> Tensor:
        spec = self.spec
        return split_heads(states, self.head_dim, clip=spec.clip, norm=norm, norm_over=spec.norm_over)

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
            NotImplementedError: attention weights are asked for.
            TypeError: an argument that holds a cache or a tensor is not known (arguments.py).
        """
        if kwargs.pop("output_attentions", False):
            raise NotImplementedError("a converted model does not return attention weights: decode never forms them")
        cache = take_cache(kwargs)
        output, weights = self.attended(hidden_states, position_embeddings, position_ids, attention_mask, cache, kwargs)
        return self._project(output, hidden_states, residual), weights

    def attended(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        position_ids: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' output [B,T,H,d] and the weights; the new tokens are in the cache."""
        if position_ids is None and self.spec.temperature is not None:
            seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            position_ids = torch.arange(seen, seen + hidden_states.shape[1], device=hidden_states.device)[None]
        places = self.places(position_embeddings, position_ids, hidden_states)
        query = self.true_query(hidden_states, position_ids)
        return self.attend(hidden_states, query, places, mask, cache, kwargs)

    def places(self, position_embeddings: Any, position_ids: Tensor | None, hidden_states: Tensor) -> Any:
        """What ``attend`` needs to know of the new tokens' positions: cos and sin [B or 1,1,T,P] of rope."""
        kind, pairs = self.spec.rope_table, self.rope_pairs
        return rope_tables(kind, pairs, position_embeddings, position_ids, hidden_states, self.config)

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        places: Any,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new tokens into the cache and attends to all of it; returns [B,T,H,d] and the weights."""
        raise NotImplementedError

    def attend_as_stock(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the attention that the config names; returns [B,T,H,d] and the weights.

        query [B,H,T,n], key [B,G,S,n], value [B,G,S,m]; where converted further, all heads share one key and value.
        """
        rate = self.attention_dropout if self.training else 0.0
        if self.spec.softcap is not None or self.sinks is not None:
            return self._attend_densely(query, key, value, mask, rate)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs = kwargs | {"dropout": rate, "scaling": self.scaling, "sliding_window": self.sliding_window}
        width = value.shape[-1]
        widest = max(key.shape[-1], width)  # flash kernels want keys and values of one width
        query, key, value = (_widened(states, widest) for states in (query, key, value))
        output, weights = attention(self, query, key, value, mask, **kwargs)
        return output[..., :width], weights

    def _attend_densely(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Soft-caps and sinks, which stock kernels do not have in common."""
        if mask is None and query.shape[2] > 1 and self.is_causal:
            mask = causal_mask(query.shape[2], key.shape[2], self.sliding_window, query.device)
        mask = None if mask is None else additive_mask(mask, query.dtype)
        key, value = (states.repeat_interleave(self.num_key_value_groups, dim=1) for states in (key, value))
        weights = attention_weights(query @ key.mT * self.scaling, mask, self.spec.softcap, self.sinks)
        weights = dropout(weights, rate, self.training)
        return (weights @ value).transpose(1, 2), weights

    def _project(self, output: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Tensor:
        """The heads' output [B,T,H,d], gated and normalised, projected to [B,T,D]."""
        if self.gate_proj is not None:
            gate = getattr(nn.functional, self.spec.gate_activation)(self.gate_proj(hidden_states))
            output = output * gate.unflatten(-1, (self.num_heads, -1))
        output = output.flatten(2)
        if self.output_norm is not None:
            output = self.output_norm(output)
        output = dropout(self.o_proj(output), self.output_dropout, self.training)
        return output if residual is None or not self.spec.adds_residual else residual + output


def _widened(states: Tensor, width: int) -> Tensor:
    """States [..,n] with zeros up to ``width``."""
    return pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states


def joined(heads: Tensor) -> Tensor:
    """Heads [B,N,T,d] as [B,T,N d]."""
    return heads.transpose(1, 2).flatten(2)

"""Multi-matrix factorisation attention, with values of its own (MFA) or with the keys as values (MFA-KR).

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only.

    q_proj [Cq,D], then the original's norms, or q_a_layernorm; q_b_proj [H C,Cq]; o_proj [D,H V].
    What makes latent and rope key, and channel_index [K], are LatentAttention's.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, R = 2K rope dims, C numbers of a query, V of a
value. Cached per token and layer: latent [r] and rope key [R]. A query is [what reads the latent | rope channels].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .attention import joined
from .heads import query_temperature
from .latent_attention import LatentAttention
from .spec import KEY, LayerSpec, config_entry, layers_of


class MfaAttention(LatentAttention):
    """Attention of many heads over one wide head of keys and values, cached as LatentAttention caches."""

    value_gate: Tensor | None

    def __init__(self, original: Any, config: Any, spec: LayerSpec) -> None:
        super().__init__(original, config, spec)
        self.num_key_value_groups = self.num_heads  # that share the one cached head, as stock kernels ask for it

    def _make_projections(self, hidden: int, spec: LayerSpec) -> None:
        self.mfa = mfa = spec.factorised
        queries, gate = mfa.query_rank(self.spec), self.spec.gate
        self.q_proj = nn.Linear(hidden, queries, bias=mfa.biases)
        eps = getattr(self.config, "rms_norm_eps", 1e-6)
        self.q_a_layernorm = LlamaRMSNorm(queries, eps) if mfa.query_norm else None
        self.q_b_proj = nn.Linear(queries, self.num_heads * mfa.query_width, bias=False)
        self._make_cached(hidden, spec)
        self.value_map = nn.Linear(mfa.value_width, mfa.value_width, bias=False) if mfa.value_gate else None
        self.value_gate = nn.Parameter(torch.zeros(mfa.value_width)) if mfa.value_gate else None
        self.gate_proj = nn.Linear(hidden, gate) if gate else None
        self.o_proj = nn.Linear(self.num_heads * mfa.value_width, hidden, bias=mfa.biases)

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        self.kv_lora_rank, self.qk_rope_head_dim = self.mfa.kv_lora_rank, self.mfa.qk_rope_head_dim
        self.channel_fold = 1
        self._make_encoders(hidden, spec, self.mfa.biases)

    def _make_buffers(self, spec: LayerSpec) -> None:
        """The rope pairs of the channels; in a fresh model spread over all."""
        channels = self.qk_rope_head_dim // 2
        self.register_buffer("channel_index", torch.arange(channels) * self.rope_pairs // max(1, channels))

    def true_query(self, hidden_states: Tensor, positions: Any) -> Tensor:
        """Queries [B,H,T,C] of latent and rope channels, rope not yet."""
        if self.mfa.q_lora_rank is None:
            shared = joined(super().true_query(hidden_states, positions))
        else:
            shared = self.q_proj(hidden_states)
            shared = shared if self.q_a_layernorm is None else self.q_a_layernorm(shared)
            if self.spec.temperature is not None:
                shared = shared * query_temperature(positions, self.spec.temperature).squeeze(1).to(shared.dtype)
        heads: Tensor = self.q_b_proj(shared)
        return heads.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def queries(self, query: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the latent [B,H,T,C-R] and of the rope channels [B,H,T,R]; ``angles`` as in LatentAttention."""
        nope, channels = query.split([query.shape[-1] - self.qk_rope_head_dim, self.qk_rope_head_dim], dim=-1)
        return nope, self.rotated_channels(channels, *angles) if angles else channels

    def absorbs(self, new: int, mask: Tensor | None) -> bool:
        """Whether a single token reads the cache, which the heads then share without copies."""
        if self.always_expands or new > 1 or (self.training and self.attention_dropout > 0):
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def up_projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """None: queries and outputs are in the latent's space already."""
        return like[:0], like[:0]

    def into_latent(self, query_nope: Tensor, up_key: Tensor) -> Tensor:
        """The query of the latent as it is."""
        return query_nope

    def out_of_latent(self, context: Tensor, up_value: Tensor) -> Tensor:
        """Attention to keys [..,V] as attention to values: the value map is linear, so it may come last."""
        if self.value_map is None or self.value_gate is None:
            return context
        return context + self.value_gate * self.value_map(context)

    def attend_expanded(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the attention that the config names with one head of keys; returns [B,T,H,V] and the weights."""
        key, value = self.key_and_value(latent)
        query, key = torch.cat([query_nope, query_rope], dim=-1), torch.cat([key, rope_key], dim=-1)
        output, weights = self.attend_as_stock(query, key, value, mask, kwargs)
        return self.out_of_latent(output, value[:0]), weights

    def key_and_value(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What is key and what is value of a latent [B,1,S,r]."""
        if not self.mfa.value_rank:
            return latent, latent
        key, value = latent.split([self.kv_lora_rank - self.mfa.value_rank, self.mfa.value_rank], dim=-1)
        return key, value


def fold_value_gates(model: Any) -> None:
    """Puts every value map into its output projection, in place, and says so in the config: the gates are gone then."""
    gated = [part for part in model.modules() if isinstance(part, MfaAttention) and part.value_map is not None]
    if not gated:
        return
    for attention in gated:
        _fold(attention)
    layers = layers_of(model.config.to_dict()) or ()
    folded = (
        layer if layer.mfa is None else replace(layer, mfa=replace(layer.mfa, value_gate=False)) for layer in layers
    )
    setattr(model.config, KEY, config_entry(tuple(folded)))


def _fold(attention: MfaAttention) -> None:
    """In rows the value is k M with M = I + N diag(alpha), so that every head's matrix O becomes M O."""
    if attention.value_map is None or attention.value_gate is None:
        return
    output, alpha, value_map = attention.o_proj.weight, attention.value_gate.double(), attention.value_map.weight
    by_head = output.data.double().unflatten(1, (attention.num_heads, -1))
    folded = by_head + (by_head * alpha.detach()) @ value_map.data.double()
    output.data = folded.flatten(1).to(output.dtype)
    attention.value_map = attention.value_gate = None
    attention.mfa = replace(attention.mfa, value_gate=False)
    attention.layer_spec = replace(attention.layer_spec, mfa=attention.mfa)

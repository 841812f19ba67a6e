"""Multi-head latent attention with free rope channels, for models converted by anymla.

This file is self-contained: it needs torch and transformers only, and a copy of it travels with every converted
checkpoint, so that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works without anymla.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, d head_dim, P = d/2 rope
pairs, K rope channels (R = 2K numbers), r latent rank. Cached per token and layer: latent [r] and rope key [R].
A vector of pairs is stored half-split, [real parts | imaginary parts], as Llama stores its rope pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_weight
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, eager_attention_forward
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

# Sizes of one sequence's latents (numbers) from which, in float32 on a CPU, another way to write the products beats
# the plain one, whose calls are the cheapest. Measured on two AVX-512 cores with benchmarks/decode.py.
TALL_SIZE = 1 << 17  # scores as [tokens, rows]: MKL is up to twice as fast with the long side first
STREAM_SIZE = 1 << 20  # convolutions: oneDNN streams the cache in memory order, MKL's product repacks it
FEW_ROWS = 64  # query rows (heads x tokens) up to which this holds: more are compute bound anyway
BLOCK = 256  # a maximum over the long axis of [tokens, rows] runs on one core, one over this many blocks does not


def absorbed_attention(
    query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention in latent space: the cache is read as it is and never expanded.

    query_latent [B,H,T,r], query_rope [B,H,T,R], latent [B,1,S,r], rope_key [B,1,S,R]; mask None, bool (True = may
    attend) or additive, [B,1 or H,T,S]. Returns softmax(scale * scores + mask) @ latent, [B,H,T,r].
    """
    heads, new = query_latent.shape[1:3]
    # All heads share the cache: (head, token) pairs are the rows of one matrix product. Left to broadcast, matmul would
    # read (in bfloat16 even copy) the cache once per head.
    query, query_rope = (query_latent * scale).flatten(1, 2), (query_rope * scale).flatten(1, 2)
    latent, rope_key = latent.squeeze(1), rope_key.squeeze(1)
    if mask is not None:  # bounded, so that a fully masked row stays finite
        lowest = torch.finfo(query.dtype).min / 2
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
        mask = mask.to(query.dtype).clamp_min(lowest).expand(len(query), -1, -1, -1)
    thin = query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[1] <= FEW_ROWS
    size = latent[0].numel()
    if not (thin and size >= STREAM_SIZE and latent.shape[1] >= BLOCK):
        tall = thin and size >= TALL_SIZE
        return _attend(query, query_rope, latent, rope_key, mask, new, tall).unflatten(1, (heads, new))
    masks = [None] * len(query) if mask is None else mask
    contexts = [_stream(*one) for one in zip(query, query_rope, latent, rope_key, masks, strict=True)]
    return torch.stack(contexts).unflatten(1, (heads, new))


def _attend(
    query: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None, new: int, tall: bool
) -> Tensor:
    """Plain products; query [B,HT,r] already scaled. ``tall`` puts the long side, tokens, first."""
    scores = torch.bmm(latent, query.mT) if tall else torch.bmm(query, latent.mT)
    if query_rope.shape[-1]:
        scores.baddbmm_(*((rope_key, query_rope.mT) if tall else (query_rope, rope_key.mT)))
    if tall:
        scores = scores.mT.contiguous()
    if mask is not None:
        scores.unflatten(1, (-1, new)).add_(mask)
    weights = scores.softmax(-1)  # computes in float32 for 16-bit numbers
    return torch.bmm(latent.mT, weights.mT).mT if tall else torch.bmm(weights, latent)


def _stream(query: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence, by the forward pass and the weight gradient of a 1x1 convolution.

    Tokens are the pixels, latent numbers the channels. The same sums as two matrix products.
    """
    (rows, rank), length = query.shape, len(latent)
    image = latent.reshape(1, length, 1, rank).permute(0, 3, 1, 2)
    kernel = query[:, :, None, None]
    scores = conv2d(image, kernel)[0, :, :, 0].T.contiguous()  # [S, rows], the layout it already has
    if query_rope.shape[-1]:
        scores.addmm_(rope_key, query_rope.T)
    if mask is not None:
        scores.T.unflatten(0, (-1, mask.shape[-2])).add_(mask)
    blocks = scores[: length // BLOCK * BLOCK].view(BLOCK, -1).amax(0).view(-1, rows)
    peak = torch.maximum(blocks.amax(0), scores[-BLOCK:].amax(0))  # the rest may overlap the blocks
    weights = scores.sub_(peak.detach()).exp_()  # the peak cancels, gradients included
    context = conv2d_weight(image, kernel.shape, weights.T[None, :, :, None]).flatten(1)
    return context / weights.sum(0)[:, None]


def multiply_pairs(pairs: Tensor, real: Tensor, imag: Tensor) -> Tensor:
    """Complex product of half-split pairs [..., 2N] with factors [..., N] given by their parts."""
    re, im = pairs.chunk(2, dim=-1)
    return torch.cat([re * real - im * imag, re * imag + im * real], dim=-1)


class LatentAttention(nn.Module):
    """Multi-head latent attention that stands in for the grouped-query attention ``original`` of one layer.

    What the conversion does not change (query projection, query and key norms) is taken over from ``original``.
    Keys and values are rebuilt per key/value head, so GQA stays GQA.
    """

    query_rotation: Tensor
    channel_weight: Tensor
    channel_index: Tensor

    def __init__(self, original: Any, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        super().__init__()
        self.config: Any = original.config
        self.layer_idx, self.is_causal = original.layer_idx, True
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.head_dim: int = original.head_dim
        self.num_key_value_groups: int = original.num_key_value_groups
        self.scaling: float = original.scaling
        self.attention_dropout: float = original.attention_dropout
        self.sliding_window = getattr(original, "sliding_window", getattr(self.config, "sliding_window", None))

        hidden, heads = original.q_proj.in_features, original.q_proj.out_features // self.head_dim
        kv_heads, cached = heads // self.num_key_value_groups, kv_lora_rank + qk_rope_head_dim
        self.q_proj, self.q_norm = original.q_proj, getattr(original, "q_norm", None)
        self.k_norm = getattr(original, "k_norm", None)
        if self.k_norm is None:
            self.kv_a_proj_with_mqa = nn.Linear(hidden, cached)
        else:  # the norm stands between x and the cache: encode the true, normalised keys, and the values from x
            self.k_proj = original.k_proj
            self.k_a_proj_with_mqa = nn.Linear(kv_heads * self.head_dim, cached, bias=False)
            self.v_a_proj = nn.Linear(hidden, self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, kv_heads * 2 * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden)

        channels, pairs = self.qk_rope_head_dim // 2, self.head_dim // 2
        self.register_buffer("query_rotation", torch.stack([torch.ones(heads, pairs), torch.zeros(heads, pairs)]))
        self.register_buffer("channel_weight", torch.zeros(2, kv_heads, channels))
        self.register_buffer("channel_index", torch.zeros(channels, dtype=torch.long))

    def queries(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free query [B,H,T,d] (expected rotation applied) and rotated channel query [B,H,T,R]."""
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = query.transpose(1, 2)
        real, imag = self.query_rotation.unsqueeze(-2)
        query_nope = multiply_pairs(query, real, imag)
        weight = self.channel_weight.repeat_interleave(self.num_key_value_groups, dim=1).unsqueeze(-2)
        index = self.channel_index
        channels = query[..., torch.cat([index, index + self.head_dim // 2])]
        channels = multiply_pairs(channels, weight[0], weight[1])
        return query_nope, multiply_pairs(channels, cos[..., index], sin[..., index])

    def compress(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps of the new tokens: latent [B,1,T,r] and rotated rope key [B,1,T,R]."""
        if self.k_norm is None:
            compressed = self.kv_a_proj_with_mqa(hidden_states)
            latent, rope_key = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        else:
            key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).flatten(-2)
            latent, rope_key = self.k_a_proj_with_mqa(key).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            latent = latent + self.v_a_proj(hidden_states)
        rope_key = multiply_pairs(rope_key.unsqueeze(1), cos[..., self.channel_index], sin[..., self.channel_index])
        return latent.unsqueeze(1), rope_key

    def expand_kv(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuilds key [B,G,S,d+R] and value [B,G,S,d] of every key/value head from the cached [B,1,S,r], [B,1,S,R]."""
        expanded: Tensor = self.kv_b_proj(kv_c.squeeze(1))
        expanded = expanded.view(*expanded.shape[:-1], -1, 2, self.head_dim)
        key_nope, value = expanded.permute(3, 0, 2, 1, 4).unbind()
        return torch.cat([key_nope, k_pe.expand(-1, key_nope.shape[1], -1, -1)], dim=-1), value

    def attend_absorbed(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """W_uk moves to the query and W_uv behind the attention; returns [B,T,H,d]."""
        batch, heads, new, _ = query_nope.shape
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (-1, 2, self.head_dim)).unbind(1)  # [G,d,r] each
        groups = up_key.shape[0]
        query_latent = (query_nope.reshape(batch, groups, -1, self.head_dim) @ up_key).view(batch, heads, new, -1)
        context = absorbed_attention(query_latent, query_rope, latent, rope_key, mask, self.scaling)
        output: Tensor = context.reshape(batch, groups, -1, self.kv_lora_rank) @ up_value.transpose(-1, -2)
        return output.view(batch, heads, new, self.head_dim).transpose(1, 2)

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
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        value = pad(value, (0, self.qk_rope_head_dim))  # flash kernels want keys and values of one width
        output, weights = attention(self, torch.cat([query_nope, query_rope], dim=-1), key, value, mask, **kwargs)
        return output[..., : self.head_dim], weights

    def absorbs(self, new: int, mask: Tensor | None) -> bool:
        """Whether latent space takes fewer multiply-adds than expanding the cache, and the mask allows it."""
        if self.training and self.attention_dropout > 0:
            return False
        if not (mask is None and new == 1) and not (isinstance(mask, Tensor) and mask.dim() == 4):
            return False
        heads, kv_heads = self.query_rotation.shape[1], self.channel_weight.shape[1]
        return (
            new == 1 or new * heads * (self.kv_lora_rank - self.head_dim) < kv_heads * self.head_dim * self.kv_lora_rank
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over ``hidden_states`` [B,T,D] and the cache, as the layers of transformers call it."""
        if kwargs.get("output_attentions"):
            raise NotImplementedError("a converted model does not return attention weights: decode never forms them")
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        query_nope, query_rope = self.queries(hidden_states, cos, sin)
        latent, rope_key = self.compress(hidden_states, cos, sin)
        if past_key_values is not None:
            latent, rope_key = past_key_values.update(latent, rope_key, self.layer_idx)
        inputs = (query_nope, query_rope, latent, rope_key, attention_mask)
        if self.absorbs(hidden_states.shape[1], attention_mask):
            output, weights = self.attend_absorbed(*inputs), None
        else:
            output, weights = self.attend_expanded(*inputs, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class LatentModelMixin:
    """Puts LatentAttention into every layer of the stock model, before any weight is loaded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        for layer, sizes in zip(layers, config.mla_layers, strict=True):
            layer.self_attn = LatentAttention(layer.self_attn, sizes["kv_lora_rank"], sizes["qk_rope_head_dim"])


class AnymlaLlamaConfig(LlamaConfig):
    model_type = "anymla_llama"


class AnymlaMistralConfig(MistralConfig):
    model_type = "anymla_mistral"


class AnymlaQwen2Config(Qwen2Config):
    model_type = "anymla_qwen2"


class AnymlaQwen3Config(Qwen3Config):
    model_type = "anymla_qwen3"


class AnymlaLlamaForCausalLM(LatentModelMixin, LlamaForCausalLM):
    config_class = AnymlaLlamaConfig


class AnymlaMistralForCausalLM(LatentModelMixin, MistralForCausalLM):
    config_class = AnymlaMistralConfig


class AnymlaQwen2ForCausalLM(LatentModelMixin, Qwen2ForCausalLM):
    config_class = AnymlaQwen2Config


class AnymlaQwen3ForCausalLM(LatentModelMixin, Qwen3ForCausalLM):
    config_class = AnymlaQwen3Config

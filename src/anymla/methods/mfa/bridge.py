"""Latent attention rewritten as factorised attention: the same numbers, other matrices (docs/mathematics.md, 'MFA').

Shapes: D hidden, H query heads, G key/value heads, d head_dim, r latent rank, R rope dims, V numbers of a value,
C = r - V + R (with key reuse r + R) numbers of a query.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.methods.base import Changed
from anymla.methods.mfa.queries import low_rank_queries
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.mfa_attention import MfaAttention
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.methods.mfa.settings import MFA
    from anymla.sweep.layer import Layer

REPLACED = ("kv_b_proj.weight", "query_rotation", "channel_weight")  # folded into queries and output
MAP_SIZE = 0.02  # deviation of a fresh value map's numbers


def bridge_layer(settings: MFA, layer: Layer) -> Changed:
    """Puts MFA-KR in the place of a layer's latent attention."""
    latent = layer.attention
    if not isinstance(latent, LatentAttention):
        raise ValueError(f"layer {layer.index} has no latent attention")
    spec = settings.spec(latent.kv_lora_rank, latent.qk_rope_head_dim, 0, biases=latent.q_proj.bias is not None)
    attention = bridged(latent, spec, layer.config, layer.saved)
    layer.module.set_submodule(layer.attention_path, attention)
    result = {"layer": layer.index, "rope_dims": spec.qk_rope_head_dim, "kv_rank": spec.kv_lora_rank}
    return Changed(spec=replace(attention.layer_spec, module=layer.old.module), result=result)


def bridged(
    latent: LatentAttention, mfa: MfaSpec, config: Any, saved: torch.dtype, gram: Tensor | None = None
) -> MfaAttention:
    """Factorised attention that computes what ``latent`` does, exactly where ``mfa`` names no query rank.

    ``gram`` [D+1,D+1]: moments of its input with a 1 after it, by which queries of low rank are chosen. Where
    values have numbers of their own, the latent's first r - V must make keys alone, and the last V values alone.
    """
    like = next(latent.parameters())
    spec = LayerSpec(attention=latent.spec, mfa=mfa, module=latent.layer_spec.module)
    with torch.device("meta"):
        attention: MfaAttention = attention_class(spec)(latent, config, spec)
    tensors = mfa_tensors(latent, mfa, gram)
    cast = {
        name: (tensor.to(saved).to(like.dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    attention.load_state_dict(cast, assign=True)
    return attention.eval().requires_grad_(False)


def mfa_tensors(latent: LatentAttention, mfa: MfaSpec, gram: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of MfaAttention, float64."""
    whole = copy.deepcopy(latent).double()
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if name not in REPLACED}
    query = torch.block_diag(*_query_maps(whole, mfa))
    if mfa.q_lora_rank is not None:
        down, bias, query = low_rank_queries(query, whole.q_proj, mfa.q_lora_rank, gram)
        tensors["q_proj.weight"] = down
        if mfa.biases:
            tensors["q_proj.bias"] = bias
    tensors |= {
        "q_b_proj.weight": query,
        "o_proj.weight": _output(whole, mfa),
        "channel_index": latent.channel_frequency.clone(),
    }
    if mfa.value_gate:
        width = mfa.value_width
        generator = torch.Generator().manual_seed(latent.layer_idx)
        fresh = torch.randn(width, width, generator=generator, dtype=torch.float64) * MAP_SIZE
        tensors |= {"value_map.weight": fresh.to(query.device), "value_gate": query.new_zeros(width)}
    return tensors


def _query_maps(whole: LatentAttention, mfa: MfaSpec) -> Tensor:
    """What takes a head of the original's queries, rope not yet, to the latent's and the channels' query [H,C,d].

    Rope multiplies a channel's query by a unit complex number and so does this map, so they may change places.
    """
    heads, d = whole.num_heads, whole.head_dim
    units = torch.eye(d, dtype=torch.float64, device=whole.o_proj.weight.device).expand(1, heads, d, d)
    nope, channels = whole.queries(units)
    up_key, _ = _up_projections(whole, units)
    reads = whole.into_latent(nope, up_key)[..., : whole.kv_lora_rank - mfa.value_rank]
    return torch.cat([reads, channels], dim=-1)[0].mT


def _output(whole: LatentAttention, mfa: MfaSpec) -> Tensor:
    """The output matrices of all heads on the value part of the latent [D,H V]."""
    _, up_value = _up_projections(whole, whole.o_proj.weight)
    by_head = whole.o_proj.weight.unflatten(1, (whole.num_heads, -1))
    up_value = up_value.repeat_interleave(whole.num_heads // len(up_value), dim=0)
    return torch.einsum("Dhd,hdr->Dhr", by_head, up_value[..., -mfa.value_width :]).flatten(1)


def _up_projections(whole: LatentAttention, like: Tensor) -> tuple[Tensor, Tensor]:
    up = whole.up_projections(like)
    if up is None:
        raise ValueError("kv_b_proj is no plain matrix")
    return up

"""Layers with latent attention that share an attention map: a shared one keeps the latent of its values alone.

Shapes: D hidden, G key/value heads of d numbers, n = G d, r latent rank.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.errors import UnsupportedModelError
from anymla.methods.shared_attention.build import without_map
from anymla.modeling.attention import ConvertedAttention
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.shared_spec import SharedSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

KEPT = ("o_proj.", "gate_proj.", "output_norm.")


def share_latent(layer: Layer, shared: SharedSpec) -> ConvertedAttention:
    """The attention of a layer as ``shared`` says, which computes its values as the latent attention does.

    Raises:
        UnsupportedModelError: norms or clips are before its latent, which then needs keys too.
    """
    latent: Any = layer.attention
    if not isinstance(latent, LatentAttention) or not latent.spec.linear_keys:
        raise UnsupportedModelError(f"layer {layer.index}: norms or clips are before its latent: put it before mla")
    if shared.source_layer is None:
        found = copy.deepcopy(latent)
        found.layer_spec = replace(layer.old, shared=shared, attention_bytes=None)
        found.__class__ = attention_class(found.layer_spec)
        return found
    like, rest = next(latent.parameters()), latent.state_dict()
    tensors = value_tensors({name: tensor.double() for name, tensor in rest.items()}, latent)
    norms = {} if latent.output_norm is None else {"output_norm": latent.output_norm}
    spec, biases = without_map(latent.spec, norms), "v_a_proj.bias" in tensors
    held = LatentSpec(kv_lora_rank=len(tensors["v_a_proj.weight"]), qk_rope_head_dim=0, biases=biases)
    made = replace(layer.old, attention=spec, latent=held, shared=shared, attention_bytes=None)
    with torch.device("meta"):
        attention: ConvertedAttention = attention_class(made)(latent, layer.config, made)
    cast = {name: tensor for name, tensor in rest.items() if name.startswith(KEPT)}
    cast |= {name: tensor.to(layer.saved).to(like.dtype).contiguous() for name, tensor in tensors.items()}
    attention.load_state_dict(cast, assign=True)
    return attention.eval().requires_grad_(False)


def value_tensors(tensors: dict[str, Tensor], latent: LatentAttention) -> dict[str, Tensor]:
    """What makes the latent of values, and what reads it; of a latent wider than values, the values themselves."""
    rank = latent.kv_lora_rank
    made = {f"v_a_proj.{name}": tensors.get(f"kv_a_proj_with_mqa.{name}") for name in ("weight", "bias")}
    rows = {name: tensor[:rank] for name, tensor in made.items() if tensor is not None}
    decoder = tensors["kv_b_proj.weight"].unflatten(0, (-1, 2, latent.head_dim))[:, 1].flatten(0, 1)  # [n,r]
    if rank > len(decoder):
        rows = {name: decoder @ tensor for name, tensor in rows.items()}
        decoder = torch.eye(len(decoder), dtype=decoder.dtype, device=decoder.device)
    return rows | {"v_b_proj.weight": decoder}

"""One layer with latent attention whose cache is then coded: a basis folded in, tables put into its codecs.

Shapes: r latent rank, R = 2K rope dims, P rope pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.methods.cache_coding.basis import Basis
from anymla.methods.cache_coding.coded import Coded, codec_tensors
from anymla.modeling.coded_latent import CodedLatentAttention
from anymla.modeling.coding_spec import CodedSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


def build_coded_latent(
    layer: Layer, spec: CodedSpec, latent: Coded, rope_key: Coded, inv_freq: Tensor
) -> CodedLatentAttention:
    """The attention of a layer with its latent and its rope key in codes; ``inv_freq`` [P]: as of build_coded."""
    made = replace(layer.old, coded=spec, attention_bytes=None)
    found: Any = copy.deepcopy(layer.attention)
    found.__class__ = CodedLatentAttention
    found.layer_spec = made
    found.make_codes(made)
    old = found.state_dict()
    like = next(layer.attention.parameters()).dtype
    new = {"inv_freq": inv_freq.float().view(torch.int32)}
    for name, tensor in (in_basis(old, latent.basis, rope_key.basis) | codec_tensors(latent, rope_key)).items():
        new[name] = tensor.to(layer.saved).to(like) if tensor.is_floating_point() else tensor
    device = old["channel_index"].device
    found.load_state_dict(old | {name: each.to(device).contiguous() for name, each in new.items()}, assign=True)
    attention: CodedLatentAttention = found.eval().requires_grad_(False)
    return attention


def in_basis(tensors: Mapping[str, Tensor], latent: Basis | None, rope_key: Basis | None) -> dict[str, Tensor]:
    """Those tensors of a LatentAttention that change with the bases of its latent and its rope key, float64.

    The latent's basis goes into what makes the latent and, inverted, into what reads it; that of the rope key is an
    order of its channels. No mean is taken off.
    """
    if latent is None or rope_key is None:
        return {}
    rank, order = len(latent.encoder), _channel_order(rope_key)
    rope_rows = rank + torch.cat([order, order + len(order)])
    made = {}
    for name in ("kv_a_proj_with_mqa", "k_a_proj_with_mqa", "v_a_proj"):
        for part in ("weight", "bias"):
            if (rows := tensors.get(f"{name}.{part}")) is None:
                continue
            rows = rows.double()
            rope = rows[rope_rows] if len(rows) > rank else rows[:0]
            made[f"{name}.{part}"] = torch.cat([latent.encoder.T @ rows[:rank], rope])
    made["kv_b_proj.weight"] = tensors["kv_b_proj.weight"].double() @ latent.decoder.T
    index, weight = tensors["channel_index"], tensors["channel_weight"].double()
    made["channel_index"] = index.view(-1, len(order))[:, order].flatten() if len(order) else index
    made["channel_weight"] = weight.unflatten(-1, (-1, len(order)))[..., order].flatten(-2) if len(order) else weight
    return made


def _channel_order(rope_key: Basis) -> Tensor:
    """The channels in the order in which they are coded [K]."""
    if rope_key.frequency is None:
        raise ValueError("a rope key has channels")
    return rope_key.frequency[: len(rope_key.frequency) // 2]

"""One converted layer whose cache is then coded: a basis folded in, tables put into its codecs.

Shapes: r latent rank, R = 2K rope dims, P rope pairs, C - R numbers of a query that read the latent, V of a value.
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
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.rows_attention import RowsAttention
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

Tensors = Mapping[str, Tensor]


def build_coded_latent(layer: Layer, spec: CodedSpec, keys: Coded, values: Coded, inv_freq: Tensor) -> RowsAttention:
    """The attention of a converted layer with both its vectors in codes; ``inv_freq`` [P]: as of build_coded."""
    made = replace(layer.old, coded=spec, attention_bytes=None)
    found: Any = copy.deepcopy(layer.attention)
    found.__class__ = attention_class(made)
    found.layer_spec = made
    found.make_codes(made)
    old = found.state_dict()
    like = next(layer.attention.parameters()).dtype
    new = {"inv_freq": inv_freq.float().view(torch.int32)}
    for name, tensor in (_in_basis(made, old, keys.basis, values.basis) | codec_tensors(keys, values)).items():
        new[name] = tensor.to(layer.saved).to(like) if tensor.is_floating_point() else tensor
    device = found.o_proj.weight.device
    found.load_state_dict(old | {name: each.to(device).contiguous() for name, each in new.items()}, assign=True)
    attention: RowsAttention = found.eval().requires_grad_(False)
    return attention


def _in_basis(made: LayerSpec, tensors: Tensors, keys: Basis | None, values: Basis | None) -> dict[str, Tensor]:
    """Those tensors of an attention that change with the bases of what it caches, float64."""
    if keys is None or values is None:
        return {}
    if made.latent is not None:
        return in_basis(tensors, keys, values)
    if made.mfa is not None:
        return mfa_in_basis(made, tensors, keys, values)
    return low_rank_in_basis(tensors, keys, values)


def in_basis(tensors: Tensors, latent: Basis, rope_key: Basis) -> dict[str, Tensor]:
    """Those of a LatentAttention.

    The latent's basis goes into what makes the latent and, inverted, into what reads it; that of the rope key is an
    order of its channels. No mean is taken off.
    """
    made, order = _made_in_basis(tensors, latent, rope_key), _channel_order(rope_key)
    made["kv_b_proj.weight"] = tensors["kv_b_proj.weight"].double() @ latent.decoder.T
    index, weight = tensors["channel_index"], tensors["channel_weight"].double()
    made["channel_index"] = index.view(-1, len(order))[:, order].flatten() if len(order) else index
    made["channel_weight"] = weight.unflatten(-1, (-1, len(order)))[..., order].flatten(-2) if len(order) else weight
    return made


def mfa_in_basis(layer: LayerSpec, tensors: Tensors, latent: Basis, rope_key: Basis) -> dict[str, Tensor]:
    """Those of an MfaAttention, whose queries and outputs read the latent, or each a part of it."""
    made, order, mfa = _made_in_basis(tensors, latent, rope_key), _channel_order(rope_key), layer.factorised
    reads, values = mfa.query_width - mfa.qk_rope_head_dim, mfa.value_width
    query = tensors["q_b_proj.weight"].double().unflatten(0, (-1, mfa.query_width))  # [H,C,Cq]
    rope_rows = reads + torch.cat([order, order + len(order)])
    query = torch.cat([latent.decoder[:reads, :reads] @ query[:, :reads], query[:, rope_rows]], dim=1)
    output = tensors["o_proj.weight"].double().unflatten(1, (-1, values))
    return made | {
        "q_b_proj.weight": query.flatten(0, 1),
        "o_proj.weight": (output @ latent.decoder[-values:, -values:].T).flatten(1),
        "channel_index": tensors["channel_index"][order],
    }


def low_rank_in_basis(tensors: Tensors, keys: Basis, values: Basis) -> dict[str, Tensor]:
    """Those of a CodedAttention: what makes its coefficients, and the decoders, which take the mean that comes off."""
    made: dict[str, Tensor] = {}
    for name, basis in (("key", keys), ("value", values)):
        encoder = f"{name}_encoder" if f"{name}_encoder.weight" in tensors else f"{name[0]}_proj"
        weight, bias = (tensors[f"{encoder}.{part}"].double() for part in ("weight", "bias"))
        made |= {f"{encoder}.weight": basis.encoder.T @ weight, f"{encoder}.bias": (bias - basis.mean) @ basis.encoder}
        weight, bias = (tensors[f"{name}_decoder.{part}"].double() for part in ("weight", "bias"))
        made |= {f"{name}_decoder.weight": weight @ basis.decoder.T, f"{name}_decoder.bias": bias + weight @ basis.mean}
    return made


def _made_in_basis(tensors: Tensors, latent: Basis, rope_key: Basis) -> dict[str, Tensor]:
    """What makes latent and rope key."""
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
    return made


def _channel_order(rope_key: Basis) -> Tensor:
    """The channels in the order in which they are coded [K]."""
    if rope_key.frequency is None:
        raise ValueError("a rope key has channels")
    return rope_key.frequency[: len(rope_key.frequency) // 2]

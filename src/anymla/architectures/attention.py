"""Reads one attention module of a loaded model: its weights as tensors, its projections as a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymla.architectures.blueprint import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Float64 weights of one attention layer.

    query [H,d,D]; key, value [G,d,D]; their biases [G,d] (zeros where the model has none); output [D,H,d], output_bias
    [D]. Where ``key_norm`` is set, ``key`` holds the rows before it and ``key_gain`` [d] its weight (else ones).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    key_gain: Tensor
    key_norm: bool
    scaling: float


def read_weights(attention: Any, spec: AttentionSpec) -> AttentionWeights:
    """Weights of ``attention`` in float64, heads as their own dimension."""
    d = spec.head_dim

    def rows(linear: nn.Linear) -> Tensor:
        weight: Tensor = linear.weight.detach().double()
        return weight.view(-1, d, linear.in_features)

    def bias(linear: nn.Linear) -> Tensor:
        zeros = torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
        return zeros if linear.bias is None else linear.bias.detach().double()

    norm = attention.k_norm.weight.detach().double() if spec.qk_norm else None
    return AttentionWeights(
        query=rows(attention.q_proj),
        key=rows(attention.k_proj),
        value=rows(attention.v_proj),
        key_bias=bias(attention.k_proj).view(-1, d),
        value_bias=bias(attention.v_proj).view(-1, d),
        output=attention.o_proj.weight.detach().double().unflatten(1, (-1, d)),
        output_bias=bias(attention.o_proj),
        key_gain=torch.ones_like(bias(attention.k_proj)[:d]) if norm is None else norm,
        key_norm=spec.qk_norm,
        scaling=float(attention.scaling),
    )


def project(attention: Any, spec: AttentionSpec, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True query [B,H,T,d], key and value [B,G,T,d] of ``hidden`` [B,T,D]: biases and norms applied, rope not yet."""
    query, key, value = (
        linear(hidden).unflatten(-1, (-1, spec.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if spec.qk_norm:
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

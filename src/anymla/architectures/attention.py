"""Reads one attention module of a loaded model: its weights as tensors, its projections as a function, its spec.

Heads are brought to one order of dims: [real parts of the rope pairs | imaginary parts | dims without rope].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from anymla.architectures.families import Family
from anymla.architectures.names import OUTPUTS
from anymla.architectures.parts import (
    OUTPUT_NORMS,
    VALUE_NORMS,
    check_parts,
    find_part,
    gate_of,
    linear_weights,
    projections_of,
    sinks_of,
)
from anymla.architectures.parts import norm_names as names_of_norms
from anymla.modeling.attention_spec import AttentionSpec, Temperature
from anymla.modeling.heads import query_temperature, split_heads
from anymla.modeling.shared_attention import MapSourceAttention
from anymla.modeling.shared_spec import SharedSpec

NORMS = ("q_norm", "k_norm", "v_norm", "output_norm")  # as anymla's own attention calls them


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Float64 weights of one attention layer: H query heads, G kv heads of d dims, P rope pairs, D hidden.

    query [H,d,D]; key, value [G,d,D]; their biases [H or G,d], zeros if the model has none; output [D,H,d],
    output_bias [D]. ``key_norm``: something not linear (a norm, a clip) comes between projection and key. ``key_gain``
    [G,d] is that norm's weight, or ones. ``query_gain`` [d] is put on queries after rope. ``gate`` [gate,D],
    ``gate_bias`` and ``sinks`` [H] are None if the model has none. ``centred`` False: a constant of keys or values does
    not cancel (a soft-cap, a sink, a gate), and the latent must carry it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    rope_pairs: int
    scaling: float
    key_gain: Tensor
    key_norm: bool = False
    query_gain: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    centred: bool = True


@dataclass(frozen=True)
class SourceAttention:
    """An attention module as anymla sees it.

    ``norms``: the stock modules by LatentAttention's names, in anymla's order of dims. ``spec``: all that the module
    does. ``biases``, ``exact_window``, ``shared``: of the latent attention that it is converted to.
    """

    weights: AttentionWeights
    norms: dict[str, nn.Module]
    spec: AttentionSpec
    biases: bool = True
    exact_window: int = 0
    shared: SharedSpec | None = None

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """True query [B,H,T,d], key and value [B,G,T,d] of ``hidden`` [B,T,D]: norms applied, rope not yet."""
        w = self.weights
        query = self._heads(hidden, w.query, w.query_bias, "q_norm")
        key = self._heads(hidden, w.key, w.key_bias, "k_norm")
        value = self._heads(hidden, w.value, w.value_bias, "v_norm")
        if (temperature := self.spec.temperature) is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            query = query * query_temperature(positions, temperature).to(query.dtype)
        return query, key, value

    def _heads(self, hidden: Tensor, weight: Tensor, bias: Tensor, norm: str) -> Tensor:
        states = linear(hidden, weight.flatten(0, 1).to(hidden.dtype), bias.flatten().to(hidden.dtype))
        spec = self.spec
        return split_heads(states, weight.shape[1], clip=spec.clip, norm=self.norms.get(norm), norm_over=spec.norm_over)


def read_attention(attention: Any, spec: AttentionSpec, family: Family, config: Any) -> SourceAttention:
    """The weights of a module in float64, heads as their own dimension, and all that it does.

    Raises:
        UnsupportedModelError: its shapes are not those of ``spec``, or it has a part that anymla does not know.
    """
    if isinstance(attention, MapSourceAttention):
        return _read_own(attention)
    check_parts(attention)
    order = pair_order(spec, family)
    *projections, query_gate = projections_of(attention, spec, family)
    query, key, value = (rows.unflatten(0, (-1, spec.head_dim)) for rows in projections if rows is not None)
    norms, over = _norms(attention, spec, order)
    gain = _take_gains(norms) if family.norm_after_rope else None
    output, output_bias = linear_weights(find_part(attention, OUTPUTS))
    gate = gate_of(attention) if query_gate is None else query_gate
    value_norm, output_norm = (_first_part(attention, names) for names in (VALUE_NORMS, OUTPUT_NORMS))
    for place, name in (("v_norm", value_norm), ("output_norm", output_norm)):
        if name is not None:
            norms[place] = getattr(attention, name)
    spec = replace(
        module_spec(attention, spec, family, config, gate),
        norms=names_of_norms(attention) if "q_norm" in norms else None,
        norm_over=over,
        value_norm=value_norm,
        output_norm=output_norm,
        query_gain=gain is not None,
        kept_numbers=sum(tensor.numel() for norm in norms.values() for tensor in norm.state_dict().values()),
    )
    weights = AttentionWeights(
        query=query[:, order, :-1],
        key=key[:, order, :-1],
        value=value[..., :-1],
        query_bias=query[:, order, -1],
        key_bias=key[:, order, -1],
        value_bias=value[..., -1],
        output=output.unflatten(1, (-1, spec.head_dim)),
        output_bias=output_bias,
        rope_pairs=spec.rope_pairs,
        scaling=spec.scaling,
        key_gain=gain_of(norms.get("k_norm"), key),
        key_norm=not spec.linear_keys,
        query_gain=gain,
        gate=None if gate is None else gate[:, :-1],
        gate_bias=None if gate is None else gate[:, -1],
        sinks=sinks_of(attention),
        softcap=spec.softcap,
        centred=is_centred(spec),
    )
    return SourceAttention(weights, norms, spec)


def _read_own(attention: MapSourceAttention) -> SourceAttention:
    """The same of an attention of anymla's, which says all that it does and has its heads in anymla's order."""
    spec, rows = attention.spec, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        weight, bias = linear_weights(getattr(attention, name))
        rows[name] = weight.unflatten(0, (-1, spec.head_dim)), bias.unflatten(0, (-1, spec.head_dim))
    output, output_bias = linear_weights(attention.o_proj)
    gate, gate_bias = (None, None) if attention.gate_proj is None else linear_weights(attention.gate_proj)
    norms = {name: copy.deepcopy(norm) for name in NORMS if (norm := getattr(attention, name)) is not None}
    gain = attention.query_gain
    weights = AttentionWeights(
        query=rows["q_proj"][0],
        key=rows["k_proj"][0],
        value=rows["v_proj"][0],
        query_bias=rows["q_proj"][1],
        key_bias=rows["k_proj"][1],
        value_bias=rows["v_proj"][1],
        output=output.unflatten(1, (-1, spec.head_dim)),
        output_bias=output_bias,
        rope_pairs=spec.rope_pairs,
        scaling=spec.scaling,
        key_gain=gain_of(norms.get("k_norm"), rows["k_proj"][0]),
        key_norm=not spec.linear_keys,
        query_gain=None if gain is None else gain.double(),
        gate=gate,
        gate_bias=gate_bias,
        softcap=spec.softcap,
        centred=is_centred(spec),
    )
    return SourceAttention(weights, norms, spec)


def is_centred(spec: AttentionSpec) -> bool:
    """Whether a constant of keys or values cancels, or is one of the output."""
    return spec.softcap is None and not spec.sinks and not spec.gate and spec.output_norm is None


def pair_order(spec: AttentionSpec, family: Family) -> Tensor:
    """The family's dims of a head in anymla's order: real parts, imaginary parts, dims without rope."""
    dims, turned = torch.arange(spec.head_dim), 2 * spec.rope_pairs
    if family.rope == "interleaved":
        return torch.cat([dims[:turned:2], dims[1:turned:2], dims[turned:]])
    return dims


def module_spec(attention: Any, spec: AttentionSpec, family: Family, config: Any, gate: Tensor | None) -> AttentionSpec:
    """``spec`` with what only the module and its family say."""
    local = family.position_bias == "window" and attention.attention_type == "local"
    position_bias = family.position_bias
    if (position_bias == "window" and not local) or (position_bias == "scaled-alibi" and spec.rope_pairs):
        position_bias = None
    return replace(
        spec,
        scaling=_scaling(attention, spec, family),
        rope_table=family.rope_table if spec.rope_pairs else "none",
        clip=_clip(config) if family.clip else None,
        softcap=config.attn_logit_softcapping if family.softcap else None,
        sinks=sinks_of(attention) is not None,
        gate=0 if gate is None else len(gate),
        gate_activation=family.gate_activation or "sigmoid",
        adds_residual=family.adds_residual,
        position_bias=position_bias,
        local_window=config.window_size if local else None,
        temperature=_temperature(attention, family, config),
    )


def _first_part(attention: Any, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that the module has."""
    return next((name for name in names if hasattr(attention, name)), None)


def _clip(config: Any) -> float | None:
    clip: float | None = getattr(getattr(config, "attn_config", config), "clip_qkv", None)
    return clip


def _scaling(attention: Any, spec: AttentionSpec, family: Family) -> float:
    if family.scaling is not None:
        return family.scaling
    names = ("scaling", "softmax_scale", "inv_norm_factor")
    return float(next((getattr(attention, name) for name in names if hasattr(attention, name)), spec.head_dim**-0.5))


def _temperature(attention: Any, family: Family, config: Any) -> Temperature | None:
    if family.temperature == "llama4" and attention.attn_temperature_tuning and not attention.use_rope:
        return Temperature(scale=attention.attn_scale, offset=1.0, period=attention.floor_scale)
    if family.temperature == "ministral3":
        rope = config.rope_parameters
        scale, period = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        return Temperature(scale=scale, offset=0.0, period=period)
    return None


def _norms(attention: Any, spec: AttentionSpec, order: Tensor) -> tuple[dict[str, nn.Module], str]:
    """Query and key norm with their weights in anymla's order, and what they normalise over (heads.split_heads)."""
    names = names_of_norms(attention)
    if names is None:
        return {}, "head"
    query_norm, key_norm = (copy.deepcopy(getattr(attention, name)) for name in names)
    over = "head"
    if hasattr(query_norm, "norms"):
        over = "heads-first"
    elif any(len(weight) == spec.num_heads * spec.head_dim > spec.head_dim for weight in query_norm.parameters()):
        over = "width"
    for weight in (*query_norm.parameters(), *key_norm.parameters()):
        heads = weight.data.unflatten(-1, (-1, spec.head_dim))[..., order.to(weight.device)]
        weight.data = heads.flatten(-2)
    return {"q_norm": query_norm, "k_norm": key_norm}, over


def _take_gains(norms: dict[str, nn.Module]) -> Tensor | None:
    """The product [d] of both norms' gains, which become ones. Gains of norms after rope do not commute with it."""
    gain = None
    for norm in norms.values():
        if (weight := getattr(norm, "weight", None)) is not None:
            gain = weight.detach().double() * (1.0 if gain is None else gain)
            weight.data = torch.ones_like(weight)
    return gain


def gain_of(norm: Any, key: Tensor) -> Tensor:
    """The key norm's weight as [G,d]; ones where it has none."""
    ones = key.new_ones(key.shape[:2])
    parameters = [] if norm is None else [value.detach().double() for value in norm.parameters()]
    if hasattr(norm, "norms"):
        return torch.stack([each.weight.detach().double() for each in norm.norms])
    return ones * parameters[0].reshape(-1, key.shape[1]) if parameters else ones

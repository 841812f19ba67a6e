"""One layer with an attention whose cache is coded: bases folded into its projections, tables put into its codecs.

Shapes: D hidden, G key/value heads of d numbers, n = G d, P rope pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.methods.cache_coding.basis import Basis
from anymla.methods.cache_coding.coded import Coded, codec_tensors
from anymla.methods.cache_coding.energies import key_basis, read, value_basis
from anymla.methods.cache_coding.latent import build_coded_latent
from anymla.methods.cache_coding.plan import LayerCoding, ordered
from anymla.methods.cache_coding.tables import fit_tables
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.rows_attention import RowsAttention
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

EVEN = 0.1  # part of a weight that is the same for all tokens: single gradients overstate how much tokens differ


def build_coded(layer: Layer, spec: CodedSpec, keys: Coded, values: Coded, inv_freq: Tensor) -> RowsAttention:
    """A RowsAttention in the original's dtype and device, float64 being rounded to what is saved here, once.

    ``inv_freq`` [P]: the angle by which each pair turns per position.
    """
    if (old := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    if layer.old.latent is not None:
        return build_coded_latent(layer, spec, keys, values, inv_freq)
    original = layer.attention
    source = read_attention(original, old, layer.family, layer.config)
    made = LayerSpec(attention=source.spec, coded=spec, module=f"{layer.name}.{layer.attention_path}")
    with torch.device("meta"):
        attention: RowsAttention = attention_class(made)(original, layer.config, made)
    like = next(original.parameters())
    weights = {**_outside(source), **_projected(source, keys, values, made)}
    tensors = {name: each.to(layer.saved).to(like.dtype) for name, each in weights.items() if each is not None}
    tensors["inv_freq"] = inv_freq.float().view(torch.int32)
    if keys.basis is not None and keys.basis.frequency is not None:
        tensors["channel_index"] = keys.basis.frequency
    tensors |= codec_tensors(keys, values)
    tensors |= {f"{name}.{key}": each for name, norm in source.norms.items() for key, each in norm.state_dict().items()}
    tensors = {name: tensor.to(like.device).contiguous() for name, tensor in tensors.items()}
    attention.load_state_dict(tensors, assign=True)
    return attention.eval().requires_grad_(False)


def build_transformed(layer: Layer, coding: LayerCoding) -> tuple[RowsAttention, float]:
    """The attention of a layer as planned, and what its codes cost on the survey's sample, in nats of KL per token."""
    if (spec := layer.planned.coded) is None:
        raise ValueError(f"layer {layer.index} is planned without a coded cache")
    facts = coding.facts
    keys, key_loss = _fitted(spec.keys, key_basis(facts, coding.key_basis, layer.old), facts, "key", coding.key_bits)
    values, value_loss = _fitted(spec.values, value_basis(facts, layer.old), facts, "value", coding.value_bits)
    return build_coded(layer, spec, keys, values, read(facts["inv_freq"])), key_loss + value_loss


def _fitted(coding: Coding, basis: Basis, facts: dict[str, Any], kind: str, bits: Sequence[int]) -> tuple[Coded, float]:
    """Levels fitted to the sample of "key" or "value", and what they lose there.

    The coefficients are put in the order of ``coding``. Levels are weighted by what an error of this coefficient in
    this token costs: its gradient, squared.
    """
    channels = 0 if basis.frequency is None else len(basis.frequency)
    basis = basis.ordered(torch.tensor(ordered(bits, channels), dtype=torch.long))
    coefficients = basis.encode(read(facts[f"{kind}_sample"])).float()
    weights = (read(facts[f"{kind}_gradients"]).double() @ basis.decoder.T).square()
    weights = (1 - EVEN) * weights + EVEN * weights.mean(0)
    coded = Coded(coding=coding, basis=basis, tables=fit_tables(coefficients, coding, weights))
    codec = make_codec(coding)
    codec.set_tables(coded.tables)
    found: Tensor = codec(coefficients)
    errors = ((found - coefficients).double().square() * weights).mean(0)
    return coded, errors.sum().item() / 2


def _outside(source: SourceAttention) -> dict[str, Tensor | None]:
    """What is as in the original."""
    weights = source.weights
    return {
        "q_proj.weight": weights.query.flatten(0, 1),
        "q_proj.bias": weights.query_bias.flatten(),
        "o_proj.weight": weights.output.flatten(1),
        "o_proj.bias": weights.output_bias,
        "gate_proj.weight": weights.gate,
        "gate_proj.bias": weights.gate_bias,
        "sinks": weights.sinks,
        "query_gain": weights.query_gain,
    }


def _projected(source: SourceAttention, keys: Coded, values: Coded, made: LayerSpec) -> dict[str, Tensor]:
    """What makes coefficients of x, and keys and values of them."""
    given = source.weights
    sides = (
        ("key", "k_proj", given.key, given.key_bias, keys.basis, made.encodes_keys),
        ("value", "v_proj", given.value, given.value_bias, values.basis, made.encodes_values),
    )
    tensors: dict[str, Tensor] = {}
    for name, projection, heads, biases, basis, encodes in sides:
        weight, bias = heads.flatten(0, 1), biases.flatten()
        if basis is not None:
            if encodes:
                encoder = {"weight": basis.encoder.T, "bias": -basis.mean @ basis.encoder}
                tensors |= {f"{name}_encoder.{key}": tensor for key, tensor in encoder.items()}
            else:
                weight, bias = basis.encoder.T @ weight, (bias - basis.mean) @ basis.encoder
            tensors |= {f"{name}_decoder.weight": basis.decoder.T, f"{name}_decoder.bias": basis.mean}
        tensors |= {f"{projection}.weight": weight, f"{projection}.bias": bias}
    return tensors

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
from anymla.methods.cache_coding.energies import basis_of, read, row_bases
from anymla.methods.cache_coding.forms import Form
from anymla.methods.cache_coding.latent import build_coded_latent
from anymla.methods.cache_coding.latent_plan import LatentCoding
from anymla.methods.cache_coding.plan import LayerCoding, ordered
from anymla.methods.cache_coding.tables import fit_tables, with_farther
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.rows_attention import RowsAttention
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

EVEN = 0.1  # part of a weight that is the same for all tokens: single gradients overstate how much tokens differ


def build_coded(layer: Layer, spec: CodedSpec, keys: Coded, values: Coded, inv_freq: Tensor) -> RowsAttention:
    """A CodedAttention in the original's dtype and device, float64 being rounded to what is saved here, once.

    ``inv_freq`` [P]: the angle by which each pair turns per position.
    """
    if (old := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    if layer.old.kind is not None:
        return build_coded_latent(layer, spec, keys, values, inv_freq)
    original = layer.attention
    source = read_attention(original, old, layer.family, layer.config)
    module = f"{layer.name}.{layer.attention_path}"
    made = LayerSpec(attention=source.spec, coded=spec, module=module, packed=layer.old.packed)
    with torch.device("meta"):
        attention: RowsAttention = attention_class(made)(original, layer.config, made)
    like = next(original.parameters())
    weights = {**_outside(source), **_projected(source, keys, values, made), **codec_tensors(keys, values)}
    tensors = {name: each.to(layer.saved).to(like.dtype) for name, each in weights.items() if each is not None}
    tensors["inv_freq"] = inv_freq.float().view(torch.int32)
    if keys.basis is not None and keys.basis.frequency is not None:
        tensors["channel_index"] = _channel_index(keys.basis.frequency, spec.block_widths(source.spec)[0])
    tensors |= {f"{name}.{key}": each for name, norm in source.norms.items() for key, each in norm.state_dict().items()}
    tensors = {name: tensor.to(like.device).contiguous() for name, tensor in tensors.items()}
    attention.load_state_dict(tensors, assign=True)
    return attention.eval().requires_grad_(False)


def build_transformed(layer: Layer, coding: LayerCoding) -> tuple[RowsAttention, float]:
    """The attention of a layer as planned, and what its codes cost on the survey's sample, in nats of KL per token."""
    if (spec := layer.planned.coded) is None:
        raise ValueError(f"layer {layer.index} is planned without a coded cache")
    if (attention := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    facts = coding.facts

    def fitted(kind: str, form: Form, bits: Sequence[int], rows: Coding) -> tuple[Coded, float]:
        basis = basis_of(facts, kind, form, attention)
        return _fitted(rows, basis.ordered(torch.tensor(ordered(bits, form, kind, attention))), facts, kind)

    keys, key_loss = fitted("key", coding.keys, coding.key_bits, spec.keys)
    values, value_loss = fitted("value", coding.values, coding.value_bits, spec.values)
    return build_coded(layer, spec, keys, values, read(facts["inv_freq"])), key_loss + value_loss


def build_transformed_latent(layer: Layer, coding: LatentCoding) -> tuple[RowsAttention, float]:
    """The same of a converted layer, or of a stock one among such."""
    spec, facts = layer.planned.codes, coding.facts
    bases = zip(row_bases(facts, coding), (coding.key_order, coding.value_order), strict=True)
    of_keys, of_values = (basis.ordered(torch.tensor(order, dtype=torch.long)) for basis, order in bases)
    keys, key_loss = _fitted(spec.keys, of_keys, facts, "key")
    values, value_loss = _fitted(spec.values, of_values, facts, "value")
    return build_coded(layer, spec, keys, values, read(facts["inv_freq"])), key_loss + value_loss


def _fitted(coding: Coding, basis: Basis, facts: dict[str, Any], kind: str) -> tuple[Coded, float]:
    """Levels fitted to the sample of "key" or "value", and what they lose there.

    Levels are weighted by what an error of this coefficient in this token costs: its gradient, squared.
    """
    coefficients = basis.encode(read(facts[f"{kind}_sample"])).float()
    weights = (read(facts[f"{kind}_gradients"]).double() @ basis.decoder.T).square()
    weights = (1 - EVEN) * weights + EVEN * weights.mean(0)
    farther, of_all = with_farther(coefficients, weights)
    coded = Coded(coding=coding, basis=basis, tables=fit_tables(farther, coding, of_all))
    codec = make_codec(coding)
    codec.set_tables(coded.tables)
    found: Tensor = codec(coefficients)
    errors = ((found - coefficients).double().square() * weights).mean(0)
    return coded, errors.sum().item() / 2


def _channel_index(frequency: Tensor, width: int) -> Tensor:
    """The rope pair of every channel; ``frequency``: of every coefficient, in blocks of ``width``."""
    real_parts = frequency.view(-1, width)[:, : (frequency[:width] >= 0).sum() // 2]
    return real_parts.flatten()


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
    if made.attention is None or made.coded is None:
        raise ValueError(f"the layer at {made.module} has no coded cache")
    widths = made.coded.block_widths(made.attention)
    sides = (
        ("key", "k_proj", given.key, given.key_bias, keys.basis, made.encodes_keys, widths[0]),
        ("value", "v_proj", given.value, given.value_bias, values.basis, made.encodes_values, widths[1]),
    )
    tensors: dict[str, Tensor] = {}
    for name, projection, heads, biases, basis, encodes, width in sides:
        weight, bias = heads.flatten(0, 1), biases.flatten()
        if basis is not None:
            if encodes:
                encoder = {"weight": _stacked(basis.encoder.T, width), "bias": -basis.mean @ basis.encoder}
                tensors |= {f"{name}_encoder.{key}": tensor for key, tensor in encoder.items()}
            else:
                weight, bias = basis.encoder.T @ weight, (bias - basis.mean) @ basis.encoder
            decoder = {"weight": _stacked(basis.decoder.T, width), "bias": basis.mean}
            tensors |= {f"{name}_decoder.{key}": tensor for key, tensor in decoder.items()}
        tensors |= {f"{projection}.weight": weight, f"{projection}.bias": bias}
    return tensors


def _stacked(matrix: Tensor, width: int) -> Tensor:
    """The blocks of a block diagonal matrix [n,n] under each other: [n,width]; a matrix of one block as it is."""
    if width in (matrix.shape[0], matrix.shape[1]):
        return matrix
    blocks = enumerate(matrix.split(width))
    return torch.cat([rows[:, number * width : (number + 1) * width] for number, rows in blocks])

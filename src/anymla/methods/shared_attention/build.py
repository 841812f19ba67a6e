"""The weights of a layer that shares an attention map, those of the original in the house's order of dims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.errors import UnsupportedModelError
from anymla.modeling.attention import ConvertedAttention
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.shared_spec import SharedSpec
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")
OF_MAPS = ("q_norm", "k_norm")  # norms that a layer without queries and keys has no use for


def read_layer(layer: Layer) -> SourceAttention:
    """The original's attention of a layer.

    Raises:
        UnsupportedModelError: it has none.
    """
    if layer.old.attention is None:
        raise UnsupportedModelError(f"layer {layer.index} has no softmax attention")
    return read_attention(layer.attention, layer.old.attention, layer.family, layer.config)


def build_sharing(layer: Layer, shared: SharedSpec, order: list[int] | None = None) -> ConvertedAttention:
    """The attention of a layer as ``shared`` says, in the original's dtype and device, rounded to what is saved once.

    ``order`` [H]: which of its heads attends by each head's map of the source (align.py). Default: the same one.
    """
    original, source = layer.attention, read_layer(layer)
    own = shared.source_layer is None
    weights = source.weights
    biases = (weights.query_bias, weights.key_bias, weights.value_bias, weights.output_bias)
    shared = replace(shared, biases=any(bool(bias.any()) for bias in biases))
    spec = source.spec if own else without_map(source.spec, source.norms)
    made = LayerSpec(attention=spec, shared=shared, module=f"{layer.name}.{layer.attention_path}")
    with torch.device("meta"):
        attention: ConvertedAttention = attention_class(made)(original, layer.config, made)
    like = next(original.parameters())
    tensors = _values(source) if order is None else _values(_reordered(source, order))
    tensors |= _queries_and_keys(source) if own else {}
    cast = {name: each.to(layer.saved).to(like.dtype) for name, each in tensors.items() if each is not None}
    cast = {name: each for name, each in cast.items() if shared.biases or name not in BIASES}
    norms = {name: norm for name, norm in source.norms.items() if own or name not in OF_MAPS}
    cast |= {f"{name}.{key}": each for name, norm in norms.items() for key, each in norm.state_dict().items()}
    attention.load_state_dict({name: each.to(like.device).contiguous() for name, each in cast.items()}, assign=True)
    return attention.eval().requires_grad_(False)


def without_map(spec: AttentionSpec, norms: Mapping[str, nn.Module]) -> AttentionSpec:
    """What an attention with these norms is once it makes no queries and keys."""
    kept = [norm for name, norm in norms.items() if name not in OF_MAPS]
    numbers = sum(tensor.numel() for norm in kept for tensor in norm.state_dict().values())
    return replace(spec, norms=None, query_gain=False, temperature=None, kept_numbers=numbers)


def _values(source: SourceAttention) -> dict[str, Tensor | None]:
    weights = source.weights
    return {
        "v_proj.weight": weights.value.flatten(0, 1),
        "v_proj.bias": weights.value_bias.flatten(),
        "o_proj.weight": weights.output.flatten(1),
        "o_proj.bias": weights.output_bias,
        "gate_proj.weight": weights.gate,
        "gate_proj.bias": weights.gate_bias,
    }


def _queries_and_keys(source: SourceAttention) -> dict[str, Tensor | None]:
    weights = source.weights
    return {
        "q_proj.weight": weights.query.flatten(0, 1),
        "q_proj.bias": weights.query_bias.flatten(),
        "k_proj.weight": weights.key.flatten(0, 1),
        "k_proj.bias": weights.key_bias.flatten(),
        "query_gain": weights.query_gain,
    }


def _reordered(source: SourceAttention, order: list[int]) -> SourceAttention:
    """The same layer with its heads in another order; heads of a group stay together.

    Raises:
        UnsupportedModelError: a norm over all heads follows them.
    """
    if source.spec.output_norm is not None:
        raise UnsupportedModelError("align_heads: a norm over all heads' outputs knows their order; leave it off")
    weights, heads = source.weights, torch.tensor(order, device=source.weights.value.device)
    groups = heads[:: len(heads) // len(weights.value)] // (len(heads) // len(weights.value))
    gate, gate_bias = (
        None if each is None else each.unflatten(0, (len(heads), -1))[heads].flatten(0, 1)
        for each in (weights.gate, weights.gate_bias)
    )
    changed = replace(
        weights,
        value=weights.value[groups],
        value_bias=weights.value_bias[groups],
        output=weights.output[:, heads],
        gate=gate,
        gate_bias=gate_bias,
    )
    return replace(source, weights=changed)

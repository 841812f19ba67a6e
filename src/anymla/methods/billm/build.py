"""One layer with packed linears in the place of its own: Hessians of their inputs, then one matrix after the other.

Shapes: T tokens, O numbers out, I numbers in.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.architectures.parts import linear_weights
from anymla.methods.base import Changed
from anymla.methods.billm.binarise import Binarised, binarised
from anymla.model_run.hessians import Hessians
from anymla.modeling.attention import ConvertedAttention
from anymla.modeling.packed_linear import PackedLinear, pack_bits
from anymla.modeling.packed_spec import PackedSpec

if TYPE_CHECKING:
    from anymla.methods.billm.settings import BiLLM
    from anymla.sweep.layer import Layer

OTHERS = ("Conv1D", "FalconLinear")  # classes that do what a Linear does
NOT_CACHED = ("q_proj", "q_b_proj", "gate_proj", "o_proj")  # of a converted attention: all others make the cache


def pack_layer(layer: Layer, settings: BiLLM) -> Changed:
    """Packs the linears of a layer that ``settings`` do not keep; the layer is as it was where none is left."""
    linears = packable(layer, settings)
    hessians, shapes = Hessians(linears), dict[str, tuple[int, int]]()
    hessians.gather(layer)
    if (planned := layer.planned.packed) is None:
        raise ValueError(f"layer {layer.index} is planned without packed linears")
    lost, power = 0.0, 0.0
    for name, module in linears.items():
        if (hessian := hessians.of(name)) is None:  # no token came here
            continue
        weight, _ = linear_weights(module)
        found = binarised(weight, hessian, settings, layer.saved)
        layer.module.set_submodule(name, packed_linear(found, planned, module))
        shapes[name] = (weight.shape[0], weight.shape[1])
        lost += _power(found.values - weight, hessian)
        power += _power(weight, hessian)
    result: dict[str, Any] = {"layer": layer.index, "linears": len(shapes)}
    if not shapes:
        return Changed(spec=layer.old, result=result)
    packed = replace(planned, layer=layer.name, linears=shapes)
    bits = 8 * packed.size(layer.saved.itemsize) / packed.weights
    spec_after = replace(layer.old, packed=packed, attention_bytes=None, other_bytes=None)
    return Changed(spec=spec_after, result=result | {"bits_per_weight": bits, "error": lost / max(power, 1e-300)})


def packable(layer: Layer, settings: BiLLM) -> dict[str, nn.Module]:
    """The linears that are to be packed, by their path in the layer."""
    inside = "" if layer.old.attention is None else f"{layer.attention_path}."
    cached = bool(inside) and isinstance(layer.attention, ConvertedAttention)
    found = {}
    for name, module in layer.module.named_modules():
        plain = type(module) is nn.Linear or type(module).__name__ in OTHERS
        if not plain or any(fnmatch(name, pattern) for pattern in settings.keep):
            continue
        if inside and name.startswith(inside):
            makes_cache = cached and name.removeprefix(inside) not in NOT_CACHED
            if makes_cache or not settings.attention:
                continue
        found[name] = module
    return found


def packed_linear(found: Binarised, spec: PackedSpec, original: Any) -> PackedLinear:
    """The module that holds a binarised matrix, with the bias of the ``original``, on its device and in its dtype."""
    (out, into), weight = found.values.shape, original.weight
    with torch.device("meta"):
        made = PackedLinear(spec, out, into, bias=original.bias is not None)
    planes = {name: pack_bits(getattr(found, name)) for name in ("signs", "second", "salient")}
    tensors = {**planes, "scales": found.scales.to(weight.dtype)}
    if original.bias is not None:
        tensors["bias"] = original.bias.detach()
    made.load_state_dict({name: tensor.to(weight.device) for name, tensor in tensors.items()}, assign=True)
    return made.eval().requires_grad_(False)


def _power(weight: Tensor, hessian: Tensor) -> float:
    """The squared size of all outputs of ``weight`` [O,I]."""
    return ((weight @ hessian) * weight).sum().item()

"""Which linear layers a ModelSpec packs, and the ``quantization_config`` that says so in config.json."""

from __future__ import annotations

from typing import Any

from torch import nn

from anymla.modeling.spec import LayerSpec, ModelSpec

KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")  # alone or beside queries
REPLACED = ("q_proj", "o_proj")  # of a converted attention; all else there makes the cache or rebuilds it


def packed_linears(module: nn.Module, spec: LayerSpec) -> dict[str, int]:
    """Bits of each linear layer of ``module`` that ``spec`` packs, or has packed, by its name there."""
    if (packing := spec.packed) is None:
        return {}
    attention = spec.module if spec.kind is not None else None
    found = {}
    for name, part in module.named_modules():
        path, _, last = name.rpartition(".")
        if not (isinstance(part, nn.Linear) or hasattr(part, "weight_packed")):
            continue
        if attention is not None and path and attention.endswith(f".{path}"):
            if last in REPLACED and part.in_features % packing.group == 0:
                found[name] = packing.bits
        else:
            found[name] = packing.cache_bits if last in KEYS_AND_VALUES else packing.bits
    return found


def quantization_config(model: Any, layers: nn.ModuleList, spec: ModelSpec) -> dict[str, Any] | None:
    """What config.json says of packed weights, as compressed-tensors reads it; None where none are packed.

    Args:
        model: the model.
        layers: its decoder layers.
        spec: what they are.
    """
    packing = next((layer.packed for layer in spec.layers if layer.packed is not None), None)
    if packing is None:
        return None
    names = {module: name for name, module in model.named_modules()}
    packed = {
        f"{names[layer]}.{name}": bits
        for layer, of_layer in zip(layers, spec.layers, strict=True)
        for name, bits in packed_linears(layer, of_layer).items()
    }
    linears = [name for module, name in names.items() if isinstance(module, nn.Linear)]
    others = sorted({name.rpartition(".")[2] for name, bits in packed.items() if bits != packing.bits})
    targets = {packing.cache_bits: [rf"re:.*\.({'|'.join(others)})$"]} if others else {}  # before what means all
    targets[packing.bits] = ["Linear"]
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": packing.group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": names_of, "weights": {"num_bits": bits, **weights}}
            for number, (bits, names_of) in enumerate(targets.items())
        },
        "ignore": [name for name in linears if name not in packed],
    }

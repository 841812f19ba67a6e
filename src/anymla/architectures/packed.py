"""Which linear layers a ModelSpec packs, and the ``quantization_config`` that says so in config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anymla.architectures.model_spec import source_config
from anymla.io.checkpoint import ACCOUNT
from anymla.io.sources.quantised_kinds import quantization_of
from anymla.modeling.packing import Packing
from anymla.modeling.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from anymla.io.sources.locate import Located

KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")  # alone or beside queries
REPLACED = ("q_proj", "o_proj")  # of a converted attention; all else there makes the cache or rebuilds it


def packed_linears(module: nn.Module, spec: LayerSpec) -> dict[str, int]:
    """Bits of each linear layer of ``module`` that ``spec`` packs, or has packed, by its name there."""
    from torch import nn

    if (packing := spec.integers) is None:
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


def quantization_config(spec: ModelSpec, packed: Collection[str], plain: Collection[str]) -> dict[str, Any] | None:
    """Returns what config.json says of packed weights, as compressed-tensors reads it; None where none are packed.

    Args:
        spec: what the model's layers are.
        packed: names of the linear layers whose weights are packed in the files.
        plain: names of all others.
    """
    packing = next((layer.integers for layer in spec.layers if layer.integers is not None), None)
    if packing is None or not packed:
        return None
    others = []
    if packing.cache_bits != packing.bits:
        others = sorted({name.rpartition(".")[2] for name in packed} & {*KEYS_AND_VALUES})
    targets = {packing.cache_bits: [rf"re:.*\.({'|'.join(others)})$"]} if others else {}  # before what means all
    targets[packing.bits] = ["Linear"]
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": packing.group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": names, "weights": {"num_bits": bits, **weights}}
            for number, (bits, names) in enumerate(targets.items())
        },
        "ignore": sorted(plain),
    }


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """The packing that the :func:`quantization_config` in a config means; None where there is none, or another one."""
    groups = (quantization_of(config) or {}).get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") or {}
        if group.get("targets") == ["Linear"] and weights.get("symmetric") and weights.get("group_size"):
            return Packing(bits=weights["num_bits"], group=weights["group_size"])
    return None


def with_packing(spec: ModelSpec, packing: Packing | None) -> ModelSpec:
    """``spec`` with all its layers of softmax attention packed."""
    layers = (layer if layer.attention is None else replace(layer, integers=packing) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


def packing_in(source: Located) -> Packing | None:
    """Returns how the weights of ``source`` are packed, where one of anymla's steps did that; None otherwise.

    A checkpoint that others packed is read as any quantised one is.
    """
    ours = source.gguf is None and source.adapter is None and (source.base / ACCOUNT).is_file()
    return packing_of(source_config(source)) if ours else None

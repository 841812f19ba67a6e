"""How many structures of each kind a layer has, and what it is with fewer, from the config alone."""

from __future__ import annotations

from dataclasses import replace

from anymla.architectures.families import FAMILIES
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.modeling.width_spec import WidthSpec


def structures(model: ModelSpec, layer: LayerSpec, kind: str) -> int:
    """How many structures of a kind a layer has."""
    if kind == "neurons":
        return model.intermediate_size
    if kind == "experts":
        return model.routed_experts
    if kind == "latent":
        return 0 if layer.latent is None else layer.latent.kv_lora_rank
    return 0 if layer.attention is None else layer.attention.num_kv_heads


def sayable(groups: int, model: ModelSpec, layer: LayerSpec) -> bool:
    """Whether a config of the family can say so many KV heads with their query heads."""
    if FAMILIES[model.text_model_type].fewer_heads != "divide" or layer.attention is None:
        return True
    return model.hidden_size % (groups * layer.attention.num_heads // layer.attention.num_kv_heads) == 0


def narrower(layer: LayerSpec, kept: dict[str, int], own: bool) -> LayerSpec:
    """The layer as it will be; ``own``: whether its sizes are not its model's."""
    if own and kept.keys() - {"latent"}:
        layer = replace(
            layer, width=WidthSpec(neurons=kept.get("neurons"), experts=kept.get("experts"), heads=kept.get("heads"))
        )
    if "neurons" in kept or "experts" in kept:
        layer = replace(layer, other_bytes=None)
    if (attention := layer.attention) is not None and (groups := kept.get("heads")) is not None:
        fewer = replace(
            attention,
            num_heads=groups * attention.num_heads // attention.num_kv_heads,
            num_kv_heads=groups,
            cached_heads=groups if attention.cached_heads else 0,
            gate=attention.gate * groups // attention.num_kv_heads,
        )
        layer = replace(layer, attention=fewer, attention_bytes=None)
    if (latent := layer.latent) is not None and (rank := kept.get("latent")) is not None:
        layer = replace(layer, latent=replace(latent, kv_lora_rank=rank))
    return layer

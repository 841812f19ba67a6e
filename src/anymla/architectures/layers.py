"""What kind each decoder layer is, by the several ways in which configs say it; knows no family.

The fields are of the kinds that fields.py says, wherever this is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anymla.architectures.families import Family
from anymla.errors import UnsupportedModelError, shown

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "global", "local")
KEPT = ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp", "linear", "short_conv")


def layer_type(config: Mapping[str, Any], index: int) -> str | None:
    """Returns what the config calls layer ``index``; None where it makes no difference between layers.

    Raises:
        UnsupportedModelError: its list is shorter than the model, or holds a type that anymla does not know.
    """
    for name in ("layer_types", "layers_block_type", "block_types", "attention_layers"):
        if (types := config.get(name)) is not None:
            return _known(_entry(types, index, name, cycle=name == "block_types"), name)
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if (indices := config.get(name)) is not None:
            return "attention" if index in indices else "mamba"
    if (pattern := config.get("hybrid_override_pattern")) is not None:
        return "attention" if _entry(pattern, index, "hybrid_override_pattern") == "*" else "mamba"
    if period := config.get("attn_layer_period"):
        return "attention" if index % period == (config.get("attn_layer_offset") or 0) else "mamba"
    if interval := config.get("full_attention_interval"):
        return "full_attention" if (index + 1) % interval == 0 else "linear_attention"
    if interval := config.get("full_attention_first_of"):  # no config says it: what families.py gives as a default
        return "full_attention" if index % interval == 0 else "sliding_attention"
    pattern = config.get("sliding_window_pattern")  # of configs older than layer_types
    if isinstance(pattern, int) and pattern > 0 and not config.get("first_k_dense_replace"):
        return "full_attention" if (index + 1) % pattern == 0 else "sliding_attention"
    return None


def attends(config: Mapping[str, Any], family: Family, index: int) -> bool:
    """Returns whether layer ``index`` has softmax attention."""
    return family.all_layers_attend or layer_type(config, index) not in KEPT


def has_rope(config: Mapping[str, Any], family: Family, index: int) -> bool:
    """Returns whether rope turns the queries and keys of layer ``index``.

    Raises:
        UnsupportedModelError: it depends on the layer's type, and the config does not say that.
    """
    if family.rope is None or (family.position_bias == "scaled-alibi" and config.get("alibi")):
        return False
    if "position_embedding_type" in family.defaults and config.get("position_embedding_type") != "rope":
        return False
    settings, kind = config.get("rope_parameters"), layer_type(config, index)
    if isinstance(settings, Mapping) and kind in settings and settings[kind] is None:
        return False
    if family.rope_layers == "no_rope_layers":
        if layers := config.get("no_rope_layers"):
            return bool(_entry(layers, index, "no_rope_layers"))
        return (index + 1) % (config.get("no_rope_layer_interval") or 4) != 0
    return family.rope_layers == "all" or _has_rope_by_type(config, family, index)


def _has_rope_by_type(config: Mapping[str, Any], family: Family, index: int) -> bool:
    """Whether layer ``index`` is of a type that has rope: one with a window, mostly (families.py, ``rope_layers``)."""
    if family.rope_layers == "sliding-or-all" and config.get("sliding_window", True) is None:
        return True
    if family.rope_layers == "sliding-or-dense" and config.get("prefix_dense_sliding_window_pattern", 1) == 1:
        types, dense = config.get("mlp_layer_types"), config.get("first_k_dense_replace") or 0
        if index < dense if types is None else _entry(types, index, "mlp_layer_types") == "dense":
            return True
    if (kind := layer_type(config, index)) is None:
        raise UnsupportedModelError("config.json: layer_types is missing, and only layers with a window have rope here")
    return kind == "sliding_attention"


def heads_of(config: Mapping[str, Any], index: int) -> int | None:
    """Query heads of layer ``index``, where layers have different numbers of them."""
    if (heads := config.get("num_attention_heads_per_layer")) is None:
        return None
    return int(_entry(heads, index, "num_attention_heads_per_layer"))


def window_of(window: int | None, config: Mapping[str, Any], family: Family, index: int) -> int | None:
    """The sliding window of layer ``index``."""
    kind, window = layer_type(config, index), window or None
    if family.optional_sliding_window:
        if not config.get("use_sliding_window", False):
            return None
        if kind is None:
            return window if index >= (config.get("max_window_layers") or 0) else None
    return window if kind in (None, "sliding_attention", "local") else None


def cache_window_of(window: int | None, config: Mapping[str, Any], family: Family, index: int) -> int | None:
    """The window of transformers' cache of layer ``index``, whose attention has the sliding ``window``."""
    kind = layer_type(config, index)
    if kind == "local":  # GPT-Neo's mask alone has the window
        return None
    alone = kind is None and family.rope_layers == "no_rope_layers"  # Llama 4 without layer_types
    if kind == "chunked_attention" or (alone and has_rope(config, family, index)):
        return config.get("attention_chunk_size")
    return window


def _entry(values: Sequence[Any], index: int, name: str, *, cycle: bool = False) -> Any:
    if not values or (index >= len(values) and not cycle):
        raise UnsupportedModelError(f"config.json: {name} has {len(values)} entries and none for layer {index}")
    return values[index % len(values)]


def _known(kind: Any, name: str) -> str:
    if kind not in (*ATTENDING, *KEPT):
        raise UnsupportedModelError(f"config.json: {name}: a layer of type {shown(kind)} is not known to anymla")
    return str(kind)

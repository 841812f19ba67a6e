"""What a config says of each layer by its number, once some layers are gone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from anymla.errors import UnsupportedModelError, shown

# What stands in configs for each layer, in order: lists, and patterns of one letter for each.
LISTS = (
    "layer_types",
    "layers_block_type",
    "block_types",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "layer_rope_theta",
    "hybrid_override_pattern",
)
NUMBERS = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers")  # the layers that are special
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # how many layers come before the others
LAST = ("moe_layer_end_index",)  # the last layer that is special; -1: the model's last
# What makes a layer's kind out of its number, and the values that make no difference between layers.
FORMULAS: dict[str, tuple[Any, ...]] = {
    "attention_types": (None,),
    "attn_layer_period": (None, 1),
    "decoder_sparse_step": (None, 1),
    "expert_layer_period": (None, 1),
    "moe_layer_interval": (None, 1),
    "scale_attn_by_inverse_layer_idx": (None, False),
}


def renumber(config: Any, layers: int, removed: Collection[int]) -> None:
    """Takes what ``config``, the language model's, says of the ``removed`` of its ``layers`` out of it.

    Raises:
        UnsupportedModelError: a formula in it makes a layer's kind out of its number.
    """
    if not removed:
        return
    kept = [index for index in range(layers) if index not in removed]
    for name, neutral in FORMULAS.items():
        if (value := getattr(config, name, None)) not in neutral:
            raise UnsupportedModelError(
                f"no layer of '{config.model_type}' can be removed: {name} {shown(value)} says by its number what it is"
            )
    for name in (*LISTS, *NUMBERS, *FIRST, *LAST):
        other_name = name in getattr(config, "attribute_map", {})
        derived = other_name or isinstance(getattr(type(config), name, None), property)
        if not derived and (value := getattr(config, name, None)) is not None:
            setattr(config, name, _renumbered(name, value, layers, kept))


def _renumbered(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    """The ``value`` of a field where only the layers ``kept`` are left of ``layers``."""
    if name in NUMBERS:
        return [place for place, index in enumerate(kept) if index in value]
    if name in FIRST:
        return sum(index < value for index in kept)
    if name in LAST:
        return value if value < 0 else sum(index <= value for index in kept) - 1
    if len(value) != layers:  # a pattern that is repeated
        return value
    left = [value[index] for index in kept]
    return "".join(left) if isinstance(value, str) else left

"""A stock config that says what a ModelSpec is: the one place where a step's spec becomes fields of config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import AliasChoices

from anymla.architectures.block import EXPERTS
from anymla.architectures.fewer_layers import renumber
from anymla.architectures.fields import Fields
from anymla.architectures.model_spec import spec_of
from anymla.errors import UnsupportedModelError, shown
from anymla.modeling.attention_spec import CONFIG_FIELDS, AttentionSpec
from anymla.modeling.spec import KEY, LayerSpec, ModelSpec, config_entry

SIZES: dict[str, Callable[[ModelSpec], set[int]]] = {  # by the name in Fields: the values that the layers have
    "num_layers": lambda spec: {len(spec.layers)},
    "num_kv_heads": lambda spec: {attention.num_kv_heads for attention in _attentions(spec)},
    "num_heads": lambda spec: {attention.num_heads for attention in _attentions(spec)},
    "intermediate_size": lambda spec: {spec.intermediate_size},
    "routed_experts": lambda spec: {spec.routed_experts},
}


def config_after(config: Any, before: ModelSpec, after: ModelSpec, removed: Collection[int] = ()) -> Any:
    """The config of a model once a step has made ``after`` of it: ``config`` itself where no field changes.

    Args:
        config: of transformers, the whole model's; it stays as it is.
        before: what it says.
        after: what the step planned.
        removed: the layers, by their numbers before, that it does not have.

    Raises:
        UnsupportedModelError: no config of this family says it.
    """
    changed = {name: found for name, sizes in SIZES.items() if (found := sizes(after)) not in (sizes(before), set())}
    if not changed:
        return config
    if "num_heads" in changed:  # most configs derive it from hidden_size where they do not say it
        changed["head_dim"] = {attention.head_dim for attention in _attentions(after)}
    made = copy.deepcopy(config)
    text = made.get_text_config()
    renumber(text, len(before.layers), removed)
    for name, values in changed.items():
        if len(values) > 1:
            raise UnsupportedModelError(f"no config of '{text.model_type}' can say {name} {sorted(values)}")
        setattr(text, _field(text, name), values.pop())
    if hasattr(made, KEY):
        setattr(made, KEY, config_entry(after.layers))
    try:
        if hasattr(made, "validate"):
            made.validate()
    except StrictDataclassError as error:
        raise UnsupportedModelError(f"no config of '{text.model_type}' can say it: {shown(str(error))}") from error
    if _facts(spec_of(made.to_dict())) != _facts(after):
        raise UnsupportedModelError(f"no config of '{text.model_type}' can say {' and '.join(changed)} of this step")
    return made


def own_width(config: Any, layer: LayerSpec, path: str) -> LayerSpec:
    """``layer``, at ``path`` in the model, with the fields of ``config`` that say its own sizes; as it is without any.

    Raises:
        UnsupportedModelError: no config of this family says one.
    """
    if (width := layer.width) is None:
        return layer
    sizes = {"intermediate_size": width.neurons, "routed_experts": width.experts, "num_kv_heads": width.heads}
    if width.heads is not None and (attention := layer.attention) is not None:
        sizes |= {"num_heads": attention.num_heads, "head_dim": attention.head_dim}
    fields = {_field(config, name): size for name, size in sizes.items() if size is not None}
    return replace(layer, width=replace(width, layer=path, config=fields))


def _attentions(spec: ModelSpec) -> list[AttentionSpec]:
    """The attention of all layers that have as many heads as the config says."""
    own = {index for index, layer in enumerate(spec.layers) if layer.width is not None and layer.width.heads}
    return [attention for index, attention in spec.attention_layers.items() if index not in own]


def _field(config: Any, name: str) -> str:
    """What ``config`` calls a field of Fields."""
    known = [each for each in _names(name) if hasattr(config, each)]
    if not known and name != "head_dim":
        raise UnsupportedModelError(f"no config of '{config.model_type}' can say {name}")
    return known[0] if known else name


def _names(name: str) -> list[str]:
    """What families call a field of Fields, or their number of experts, at the top of their configs."""
    if name == "routed_experts":
        return [*EXPERTS]
    alias = Fields.model_fields[name].validation_alias
    return [each for each in alias.choices if isinstance(each, str)] if isinstance(alias, AliasChoices) else [name]


def _facts(spec: ModelSpec) -> list[Any]:
    """What a config says of widths, and of every layer's attention."""
    layers = [[getattr(layer.attention, name, None) for name in CONFIG_FIELDS] for layer in spec.layers]
    return [spec.intermediate_size, spec.routed_experts, *layers]

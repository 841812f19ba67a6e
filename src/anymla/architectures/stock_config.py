"""A stock config that says what a ModelSpec is: the one place where a step's spec becomes fields of config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import AliasChoices

from anymla.architectures.block import EXPERTS
from anymla.architectures.fewer_layers import renumber
from anymla.architectures.fields import Fields
from anymla.architectures.model_spec import spec_of
from anymla.errors import UnsupportedModelError, shown
from anymla.modeling.attention_spec import CONFIG_FIELDS
from anymla.modeling.spec import KEY, ModelSpec, config_entry

SIZES: dict[str, Callable[[ModelSpec], set[int]]] = {  # by the name in Fields: the values that the layers have
    "num_layers": lambda spec: {len(spec.layers)},
    "num_kv_heads": lambda spec: {attention.num_kv_heads for attention in spec.attention_layers.values()},
    "num_heads": lambda spec: {attention.num_heads for attention in spec.attention_layers.values()},
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
        changed["head_dim"] = {attention.head_dim for attention in after.attention_layers.values()}
    made = copy.deepcopy(config)
    text = made.get_text_config()
    renumber(text, len(before.layers), removed)
    for name, values in changed.items():
        known = [each for each in _names(name) if hasattr(text, each)]
        if not (known or name == "head_dim") or len(values) > 1:
            raise UnsupportedModelError(f"no config of '{text.model_type}' can say {name} {sorted(values)}")
        setattr(text, known[0] if known else name, values.pop())
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

"""A stock config that says what a ModelSpec is: the one place where a step's spec becomes fields of config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import AliasChoices

from anymla.architectures.fewer_layers import renumber
from anymla.architectures.fields import Fields
from anymla.architectures.model_spec import spec_of
from anymla.errors import UnsupportedModelError, shown
from anymla.modeling.spec import CONFIG_FIELDS, ModelSpec

SIZES: dict[str, Callable[[ModelSpec], set[int]]] = {  # by the name in Fields: the values that the layers have
    "num_layers": lambda spec: {len(spec.layers)},
    "num_kv_heads": lambda spec: {attention.num_kv_heads for attention in spec.attention_layers.values()},
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
    made = copy.deepcopy(config)
    text = made.get_text_config()
    renumber(text, len(before.layers), removed)
    for name, values in changed.items():
        field = next((each for each in _names(name) if hasattr(text, each)), None)
        if field is None or len(values) > 1:
            raise UnsupportedModelError(f"no config of '{text.model_type}' can say {name} {sorted(values)}")
        setattr(text, field, values.pop())
    try:
        if hasattr(made, "validate"):
            made.validate()
    except StrictDataclassError as error:
        raise UnsupportedModelError(f"no config of '{text.model_type}' can say it: {shown(str(error))}") from error
    if _facts(spec_of(made.to_dict())) != _facts(after):
        raise UnsupportedModelError(f"no config of '{text.model_type}' can say {' and '.join(changed)} of this step")
    return made


def _names(name: str) -> list[str]:
    """What families call a field of Fields, at the top of their configs."""
    alias = Fields.model_fields[name].validation_alias
    return [each for each in alias.choices if isinstance(each, str)] if isinstance(alias, AliasChoices) else [name]


def _facts(spec: ModelSpec) -> list[list[Any]]:
    """What a config says of every layer's attention."""
    return [[getattr(layer.attention, name, None) for name in CONFIG_FIELDS] for layer in spec.layers]

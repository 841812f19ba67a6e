"""Makes transformers' Auto classes know the converted families.

Imports of transformers, direct or not, stand inside the functions: they run :func:`register` themselves.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from anymla.architectures.families import FAMILIES, TEXT_ONLY_INSIDE
from anymla.architectures.vision import VISION
from anymla.io.auto import auto_class, stock_class


def converted_class(architecture: str) -> Any:
    """The converted counterpart of the model class ``architecture`` of transformers."""
    from anymla.modeling import modeling_anymla

    return getattr(modeling_anymla, modeling_anymla.PREFIX + architecture)


@cache
def register() -> None:
    """Registers every converted family; saving one of them also writes its modelling files beside the weights.

    A family's model follows when its config is first made: to load the models of all families takes seconds.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for family in {*FAMILIES} - TEXT_ONLY_INSIDE | {*VISION}:
        if family not in CONFIG_MAPPING_NAMES:  # younger than the installed transformers
            continue
        config = converted_class(CONFIG_MAPPING[family].__name__)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()
        config.__new__ = partial(_new, config, family)


def _new(config: Any, family: str, made: Any, *_: Any, **__: Any) -> Any:
    """An object of ``made``, a kind of ``config``, which is made or unpickled once its family's model is registered."""
    _register_model(family)
    return super(config, made).__new__(made)


@cache
def _register_model(family: str) -> None:
    model, auto = converted_class(stock_class(family).__name__), auto_class(family)
    auto.register(model.config_class, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)


def modelling_files(module: Any) -> list[Path]:
    """The file of ``module``, one of anymla.modeling, and all that it imports: what travels with a checkpoint."""
    from transformers.dynamic_module_utils import get_relative_import_files

    own = Path(module.__file__)
    return [own, *(Path(file) for file in get_relative_import_files(own))]

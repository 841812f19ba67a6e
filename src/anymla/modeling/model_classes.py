"""Models of transformers with another attention, made when they are first asked for; travels with every checkpoint."""

from __future__ import annotations

from typing import Any

import transformers


class ReplacedAttention:
    """What all models have in common whose ``__init__`` puts another attention into a stock model."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the stock model's own way of filling buffers that a checkpoint does not hold is the right one here."""
        return False


def made_class(name: str, prefix: str, mixin: type[ReplacedAttention], module: dict[str, Any]) -> Any:
    """Makes the class ``name`` of ``module``, its globals: a stock model, with ``mixin``, or config under ``prefix``.

    Raises:
        AttributeError: transformers has no such class.
    """
    stock = getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
    if stock is None:
        raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
    here = {"__module__": module["__name__"], "__doc__": f"{stock.__name__} with multi-head latent attention."}
    if hasattr(stock, "config_class"):
        config_name = prefix + stock.config_class.__name__
        config_class = module.get(config_name) or made_class(config_name, prefix, mixin, module)
        made = type(name, (mixin, stock), here | {"config_class": config_class})
    else:
        made = type(name, (stock,), here | {"model_type": f"{prefix.lower()}_{stock.model_type}"})
    module[name] = made
    return made

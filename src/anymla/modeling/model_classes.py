"""Models of transformers with another attention, made when they are first asked for; travels with every checkpoint."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import transformers
from packaging.version import Version

NEWEST_TESTED = "5.24"  # release of transformers; CONTRIBUTING.md says how it is raised


class ReplacedAttention:
    """What all models have in common whose ``__init__`` puts another attention into a stock model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn_of_untested()
        super().__init__(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the stock model's own way of filling buffers that a checkpoint does not hold is the right one here."""
        return False

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what ``generate_batch`` and continuous batching begin with.

        Raises:
            NotImplementedError: always. transformers' paged cache has one width for keys and values.
        """
        raise NotImplementedError(
            "continuous batching (generate_batch) cannot hold a latent and a rope key of different widths: "
            "give generate a padded batch, or serve an export of `anymla export` with vLLM"
        )


@functools.cache  # once
def _warn_of_untested() -> None:
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"these modelling files of anymla were tested with transformers up to {NEWEST_TESTED}, and this is "
            f"{transformers.__version__}: what they do not know raises an error. "
            "Newer files: `pip install -U anymla`, then `anymla refresh FOLDER`",
            stacklevel=2,
        )


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

"""Models of transformers whose attention was converted to multi-head latent attention by anymla.

``AnymlaLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with LatentAttention in the layers that its config
names, and so for every other class: they are made when they are first asked for. With the files that it imports, a copy
of this one travels with every converted checkpoint, so that ``from_pretrained(folder, trust_remote_code=True)`` works
without anymla.
"""

from __future__ import annotations

from typing import Any

import transformers

from .latent_attention import LatentAttention

PREFIX = "Anymla"


class LatentModelMixin:
    """Puts LatentAttention into the stock model, where ``config.mla_layers`` says, before any weight is loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in config.mla_layers:
            replace_attention(self, **layer)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the stock model's own way of filling buffers that a checkpoint does not hold is the right one here."""
        return False


def replace_attention(model: Any, module: str, **features: Any) -> None:
    """Replaces the attention module at path ``module`` of ``model``."""
    original = model.get_submodule(module)
    model.set_submodule(module, LatentAttention(original, model.config.get_text_config(), **features))


def __getattr__(name: str) -> Any:
    """Makes the class ``name``: a stock model or config of transformers, with the prefix Anymla."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    here = {"__module__": __name__, "__doc__": f"{stock.__name__} with multi-head latent attention."}
    if hasattr(stock, "config_class"):
        config_name = PREFIX + stock.config_class.__name__
        config_class = globals().get(config_name) or __getattr__(config_name)
        made = type(name, (LatentModelMixin, stock), here | {"config_class": config_class})
    else:
        made = type(name, (stock,), here | {"model_type": f"anymla_{stock.model_type}"})
    globals()[name] = made
    return made

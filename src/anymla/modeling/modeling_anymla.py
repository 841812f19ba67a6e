"""Models of transformers whose attention was converted to multi-head latent attention by anymla.

``AnymlaLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with LatentAttention in the layers that its config
names, and so for every other class: they are made when they are first asked for. With the files that it imports, a copy
of this one travels with every converted checkpoint, so that ``from_pretrained(folder, trust_remote_code=True)`` works
without anymla.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache

from .arguments import CACHE_NAMES
from .exact_cache import make_room
from .exact_window import ExactWindowAttention
from .latent_attention import LatentAttention
from .model_classes import ReplacedAttention, made_class

PREFIX = "Anymla"


class LatentModelMixin(ReplacedAttention):
    """Puts LatentAttention into the stock model, where ``config.mla_layers`` says, before any weight is loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for layer in config.mla_layers:
            replace_attention(self, **layer)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As always; exact windows have their room in it before assisted decoding asks it to record."""
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = next((model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs), None)
        windowed = [part for part in self.modules() if isinstance(part, ExactWindowAttention)]  # type: ignore[attr-defined]
        for attention in windowed if isinstance(cache, Cache) else ():
            make_room(cache, attention.layer_idx, attention.exact_window)
        if windowed and cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()
        return made


def replace_attention(model: Any, module: str, **features: Any) -> None:
    """Replaces the attention module at path ``module`` of ``model``."""
    original, kind = model.get_submodule(module), attention_class(features)
    model.set_submodule(module, kind(original, model.config.get_text_config(), **features))


def attention_class(features: dict[str, Any]) -> type[LatentAttention]:
    """The attention that has these ``features``."""
    return ExactWindowAttention if features.get("exact_window") else LatentAttention


def __getattr__(name: str) -> Any:
    """Makes the class ``name``: a stock model or config of transformers, with the prefix Anymla."""
    return made_class(name, PREFIX, LatentModelMixin, globals())

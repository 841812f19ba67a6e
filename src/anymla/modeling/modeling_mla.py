"""Models of transformers whose attention is multi-head latent attention as vLLM's transformers backend knows it.

``MlaLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with FamilyAttention in every layer, and so for every
other class: they are made when they are first asked for. With the files that it imports, a copy of this one travels
with every vLLM export: vLLM and ``from_pretrained(folder, trust_remote_code=True)`` need nothing else.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from .fused_attention import FamilyAttention
from .model_classes import ReplacedAttention, made_class
from .spec import layers_of

PREFIX = "Mla"


class FusedModelMixin(ReplacedAttention):
    """Puts FamilyAttention into the stock model, as its config says, before any weight is loaded.

    ``config.head_dim`` is the width of what is cached: it is where vLLM looks for it. The stock model, rope included,
    is made with its own, ``config.stock_head_dim``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        stock, in_vllm = copy.deepcopy(config), config._attn_implementation == "vllm"
        if in_vllm:  # some families look their attention up by this name, and have none of that
            stock._attn_implementation = "eager"
        if config.stock_head_dim is None:
            del stock.head_dim
        else:
            stock.head_dim = config.stock_head_dim
        super().__init__(stock, *args, **kwargs)
        if not in_vllm:
            config._attn_implementation = stock._attn_implementation
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PreTrainedModel):
                module.config = config
        for layer in layers_of(config.to_dict()) or ():
            path = str(layer.module).removeprefix("" if hasattr(self, "lm_head") else f"{self.base_model_prefix}.")  # type: ignore[attr-defined]
            attention = FamilyAttention(self.get_submodule(path), config, layer)  # type: ignore[attr-defined]
            self.set_submodule(path, attention)  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Makes the class ``name``: a stock model or config of transformers, with the prefix Mla."""
    return made_class(name, PREFIX, FusedModelMixin, globals())

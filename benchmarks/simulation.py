"""Cache codecs simulated on an original model: every query of a window reads what they would leave.

Keys and values are coded and decoded inside the attention, once for the window. A query reads exact ones where the
system would still hold them: its own token, first tokens, a window of recent ones.

Shapes: B windows, T tokens, H query heads, G key/value heads, d head_dim, N calibration tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cache_baselines import Codec, Pair
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import rotate_half

from anymla.model_run.stream import decoder_layers

SKIPPED = 4  # first tokens, which no codec is fitted on


class Simulation:
    """An attention that reads keys and values as ``codec`` leaves them, and notes the exact ones where asked."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.rope: dict[int, Pair] = {}
        self.noted: dict[int, list[Pair]] | None = None

    def keep_rope(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes an attention's rope tables [B,T,d] before it runs."""
        self.rope[module.layer_idx] = kwargs["position_embeddings"]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Attention as in transformers' eager one: query [B,H,T,d], key and value [B,G,T,d]; returns [B,T,H,d]."""
        cos, sin = (table.unsqueeze(1) for table in self.rope[module.layer_idx])
        codec, plain = self.codec, key * cos - rotate_half(key) * sin  # the rotation undone
        states = [part.transpose(1, 2).flatten(2) for part in (plain if codec.before_rope else key, value)]
        if self.noted is not None:
            self.noted.setdefault(module.layer_idx, []).append((states[0].flatten(0, 1), states[1].flatten(0, 1)))
        keys, values = codec.decoded(module.layer_idx, *states)
        keys, values = (part.unflatten(-1, (-1, key.shape[-1])).transpose(1, 2) for part in (keys, values))
        if codec.before_rope:
            keys = keys * cos + rotate_half(keys) * sin
        group = query.shape[1] // key.shape[1]
        exact_key, exact_value = codec.is_exact(key.shape[2])
        key, value, keys, values = (part.repeat_interleave(group, 1) for part in (key, value, keys, values))
        scores = torch.where(exact_key, query @ key.mT, query @ keys.mT) * scaling
        weights = (scores if mask is None else scores + mask[..., : key.shape[2]]).softmax(-1)
        read = (weights * exact_value) @ value + (weights * ~exact_value) @ values
        return read.transpose(1, 2).contiguous(), None


@contextmanager
def simulated(model: Any, codec: Codec) -> Iterator[Simulation]:
    """Lets ``model``'s attentions read what ``codec`` leaves."""
    simulation, before = Simulation(codec), model.config._attn_implementation
    AttentionInterface.register("simulated", simulation.attend)
    AttentionMaskInterface.register("simulated", eager_mask)
    hooks = [
        layer.self_attn.register_forward_pre_hook(simulation.keep_rope, with_kwargs=True)
        for layer in decoder_layers(model)
    ]
    model.set_attn_implementation("simulated")
    try:
        yield simulation
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observed(model: Any, windows: Tensor, *, before_rope: bool) -> list[Pair]:
    """Every layer's keys and values [N,C] on ``windows`` [N,T], first tokens left out."""
    with simulated(model, Codec(before_rope=before_rope)) as simulation:
        kept: dict[int, list[Pair]] = {}
        for window in windows:
            simulation.noted = {}
            model.base_model(input_ids=window[None], use_cache=False)
            for layer, [(keys, values)] in simulation.noted.items():
                kept.setdefault(layer, []).append((keys[SKIPPED:], values[SKIPPED:]))
    return [(torch.cat([k for k, _ in kept[n]]), torch.cat([v for _, v in kept[n]])) for n in sorted(kept)]

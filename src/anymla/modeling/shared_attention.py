"""Attention by the attention map of an earlier layer (arXiv 2407.12866), and the attention that passes its map on.

One of the modelling files that travel with every converted checkpoint. It needs only torch and transformers. A layer
that uses another's map has no queries and no keys. It has v_proj [G d,D], o_proj [D,H d], and what its family puts on
values and outputs. Its cache holds only values, in the first of the two tensors of a layer of transformers' cache. The
length of that tensor is the length of the cache.

Shapes: B batch, T new tokens, S cached tokens, D hidden, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .absorbed import additive_mask
from .arguments import make_fit
from .attention import ConvertedAttention
from .exact_window import heads_product
from .heads import attention_weights
from .shared_spec import SharedSpec
from .spec import LayerSpec

MAPS = "attention_maps"  # the argument by which layers get the maps of their forward pass


class AttentionMap(NamedTuple):
    """How much each new token attends to each cached one.

    For fused kernels it is given by queries [B,H,T,d] and keys [B,G,S,d] after rope. For one new token it is given by
    ``weights`` [B,H,1,S], so that no layer forms its scores again.
    """

    query: Tensor
    key: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> AttentionMap:
        """The same on ``device``."""
        if self.weights is not None:
            return self._replace(weights=self.weights.to(device))
        return AttentionMap(self.query.to(device), self.key.to(device))


class AttentionMaps:
    """The maps that layers of one forward pass hand to later ones. It is made for that pass, and ends with it."""

    def __init__(self) -> None:
        self.made: dict[int, AttentionMap] = {}
        self.with_gradients = torch.is_grad_enabled()

    def put(self, layer: int, made: AttentionMap) -> None:
        """Keeps the map of ``layer``."""
        self.with_gradients = torch.is_grad_enabled()
        self.made[layer] = made

    def take(self, layer: int) -> AttentionMap:
        """The map of ``layer``.

        Raises:
            NotImplementedError: its gradient would be lost.
            ValueError: the layer handed none on.
        """
        if torch.is_grad_enabled() and not self.with_gradients:
            raise NotImplementedError(
                "shared attention maps get no gradient under reentrant gradient checkpointing: give "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if layer not in self.made:
            raise ValueError(f"layer {layer} passed on no attention map")
        return self.made[layer]


def hand_maps(decoder: nn.Module) -> None:
    """Lets every forward pass of ``decoder`` give all its layers one object for maps, new for each pass."""
    decoder.register_forward_pre_hook(_with_maps, with_kwargs=True)


def _with_maps(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {MAPS: AttentionMaps()}


class MapSourceAttention(ConvertedAttention):
    """The original's attention, which hands its map on."""

    def _biases(self, spec: LayerSpec) -> bool:
        return _shared(spec).biases

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        keys = self.num_kv_heads * self.head_dim
        self.k_proj, self.v_proj = (nn.Linear(hidden, keys, bias=_shared(spec).biases) for _ in range(2))

    def _make_buffers(self, spec: LayerSpec) -> None:
        """None."""

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        places: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to the cache and hands the map on; returns [B,T,H,d] and the weights."""
        maps = kwargs.pop(MAPS, None)
        query, key = (self.rotated(states, *places) for states in (query, self.true_key(hidden_states)))
        value = self.true_value(hidden_states)
        query = query if self.query_gain is None else query * self.query_gain
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        made = AttentionMap(query, key, self._weights(query, key, mask))
        if maps is not None:
            maps.put(self.layer_idx, made)
        return attend_by(made, self, value, mask, kwargs)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """What one new token attends to [B,H,1,S], where the mask says it of single tokens."""
        if query.shape[2] > 1 or self.training or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            return None
        mask = None if mask is None else additive_mask(mask, query.dtype)
        return attention_weights(heads_product(query * self.scaling, key), mask, self.spec.softcap, self.sinks)


class SharedAttention(ConvertedAttention):
    """Values of its own, weighted by the attention map of ``source_layer``.

    Its AttentionSpec says of scores what the source's says; what only queries and keys have is left out of it.
    """

    def __init__(self, original: Any, config: Any, spec: LayerSpec) -> None:
        super().__init__(original, config, spec)
        self.source_layer = _shared(spec).source_layer

    def _make_projections(self, hidden: int, spec: LayerSpec) -> None:
        biases, gate = _shared(spec).biases, self.spec.gate
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=biases)
        self.gate_proj = nn.Linear(hidden, gate) if gate else None
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=biases)

    def _make_buffers(self, spec: LayerSpec) -> None:
        """None."""

    def attended(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        position_ids: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new values into the cache and weights all of them; returns [B,T,H,d] and the weights.

        Raises:
            NotImplementedError: the map's gradient would be lost.
            ValueError: the layer's arguments hold no maps, or not the one that it uses.
        """
        if (maps := kwargs.pop(MAPS, None)) is None:
            raise ValueError(f"layer {self.layer_idx} was given no {MAPS}, which its decoder hands to every layer")
        value = self.cached_value(hidden_states)
        if cache is not None:
            make_fit(cache, self.layer_idx, value, value[..., :0])
            value, _ = cache.update(value, value[..., :0], self.layer_idx)
        return self.weighted(maps.take(self.source_layer).to(value.device), value, mask, kwargs)

    def cached_value(self, hidden_states: Tensor) -> Tensor:
        """What the cache keeps of the new tokens: values [B,G,T,d]."""
        return self.true_value(hidden_states)

    def weighted(
        self, made: AttentionMap, cached: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What the cache holds, weighted by a map; returns [B,T,H,d] and the weights."""
        return attend_by(made, self, cached, mask, kwargs)


def attend_by(
    made: AttentionMap, attention: ConvertedAttention, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Values [B,G,S,d] weighted by a map, in ``attention``; returns [B,T,H,d] and the weights."""
    if made.weights is not None:
        return heads_product(made.weights, value.mT).transpose(1, 2), None
    return attention.attend_as_stock(made.query, made.key, value, mask, kwargs)


def _shared(spec: LayerSpec) -> SharedSpec:
    if spec.shared is None:
        raise ValueError(f"the layer at {spec.module} shares no attention map")
    return spec.shared

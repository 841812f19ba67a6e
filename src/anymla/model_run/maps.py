"""Attention maps of a stream of windows, kept beside its hidden states while a decoder runs one layer at a time.

A layer that shares a map runs for all windows long after the layer that made it. So queries and keys after rope of
every window are held with the stream, and saved with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymla.model_run.activations import Activations
from anymla.modeling.attention import joined
from anymla.modeling.shared_attention import (
    MAPS,
    AttentionMap,
    AttentionMaps,
    MapSourceAttention,
    SharedAttention,
)
from anymla.modeling.shared_latent import MapSourceLatentAttention

Sharing = MapSourceAttention | MapSourceLatentAttention | SharedAttention  # the last one's latent form too


def sharing_part(layer: nn.Module) -> Sharing | None:
    """The attention of ``layer`` where it shares a map."""
    return next((part for part in layer.modules() if isinstance(part, Sharing)), None)


def with_maps(layer: nn.Module, stream: Activations, windows: slice, arguments: dict[str, Any]) -> dict[str, Any]:
    """The ``arguments`` of a layer, with the maps of these windows of the stream where it needs them."""
    part = sharing_part(layer)
    return arguments if part is None else arguments | {MAPS: WindowMaps(stream, windows, part)}


class WindowMaps(AttentionMaps):
    """The maps of ``windows`` of ``stream``, as the layer with the attention ``part`` puts and takes them."""

    def __init__(self, stream: Activations, windows: slice, part: Sharing) -> None:
        super().__init__()
        self.stream, self.windows, self.part = stream, windows, part

    def put(self, layer: int, made: AttentionMap) -> None:
        """Keeps queries and keys with the stream."""
        states = torch.cat([joined(made.query), joined(made.key)], dim=-1)
        if layer not in self.stream.maps:
            self.stream.maps[layer] = map_room(self.stream, layer, states.shape[-1])
        self.stream.maps[layer][self.windows] = states

    def take(self, layer: int) -> AttentionMap:
        """The map of ``layer``, which another layer put.

        Raises:
            ValueError: none did.
        """
        if layer not in self.stream.maps:
            raise ValueError(f"layer {layer} passed on no attention map")
        counts = [self.part.num_heads, self.part.num_kv_heads]
        heads = self.stream.maps[layer][self.windows].unflatten(-1, (sum(counts), -1)).transpose(1, 2)
        query, key = heads.split(counts, dim=1)
        return AttentionMap(query, key)


class OwnTokens(AttentionMaps):
    """For a few tokens whose cache alone is of interest: each attends to itself."""

    def __init__(self, part: Sharing, tokens: int, like: Tensor) -> None:
        super().__init__()
        weights = torch.eye(tokens, dtype=like.dtype, device=like.device)
        self.map = AttentionMap(like, like, weights.expand(1, part.num_heads, -1, -1))

    def put(self, layer: int, made: AttentionMap) -> None:
        """Keeps nothing."""

    def take(self, layer: int) -> AttentionMap:
        """The same for every layer."""
        return self.map


def map_room(stream: Activations, layer: int, width: int) -> Activations:
    """Room for the map of ``layer``: ``width`` numbers of every token."""
    name = f"{stream.name}-map-{layer}"
    return Activations((*stream.shape[:2], width), stream.dtype, stream.device, stream.budget, name)


def save_maps(stream: Activations, folder: Path) -> None:
    """Keeps the maps of a stream that are not kept yet."""
    for room in stream.maps.values():
        if not (path := folder / str(room.name)).exists():
            room.save(path)


def restore_maps(stream: Activations, folder: Path) -> None:
    """Takes up the maps that were kept."""
    for path in folder.glob(f"{stream.name}-map-*"):
        if path.suffix == ".next":
            continue
        layer = int(path.name.rpartition("-")[2])
        tokens = stream.shape[0] * stream.shape[1] * stream.dtype.itemsize
        stream.maps[layer] = map_room(stream, layer, path.stat().st_size // tokens)
        stream.maps[layer].restore(path)

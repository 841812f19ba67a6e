"""What a model costs: bytes of its weights and of its KV cache, counted from its spec and measured from its tensors.

The cache is that of transformers' DynamicCache. Linear-attention, convolution and state-space layers keep states whose
size no length changes: they are not counted. Counting loads no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from anymla.attention_bytes import INDEX_BYTES, attention_bytes
from anymla.modeling.slot_spec import Slot
from anymla.modeling.spec import DTYPE_BYTES, LayerSpec, ModelSpec

LENGTHS = (4096, 32768)  # tokens at which sizes are told, beside the model's context
PROBE_TOKENS = 8  # that run through a model whose cache is measured
ROOMS = ("exact", "latest")  # of a cache layer, for the last tokens' own keys and values


@dataclass(frozen=True, kw_only=True)
class LayerAccount:
    """Bytes of one layer; ``weight_bytes`` is None where it is not known.

    ``cache_bytes_per_token``: of all that is held for a token, in a layer with a sliding window until that is full.
    ``cache_bytes_once``: of what is held for the latest or the first tokens only, beside that. ``cache_bytes_at``: of
    both, by the number of tokens. ``cached_numbers``: those of ``cache_bytes_per_token``; of a coded cache its bytes.
    """

    weight_bytes: int | None = None
    cache_bytes_per_token: int = 0
    cache_bytes_once: int = 0
    cache_bytes_at: Mapping[str, int]
    cached_numbers: int = 0


@dataclass(frozen=True, kw_only=True)
class Account:
    """Bytes of a model; ``outside_bytes``: of all weights outside its layers, None where they are not known."""

    layers: tuple[LayerAccount, ...]
    outside_bytes: int | None = None

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of all weights; None where one layer's are not known."""
        parts = (self.outside_bytes, *(layer.weight_bytes for layer in self.layers))
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of a token in all layers' caches, until sliding windows are full."""
        return sum(layer.cache_bytes_per_token for layer in self.layers)

    @property
    def cache_bytes_once(self) -> int:
        """Bytes that exact tokens take beside that, however many tokens there are."""
        return sum(layer.cache_bytes_once for layer in self.layers)

    @property
    def cache_bytes_at(self) -> dict[str, int]:
        """Bytes of the whole cache by the number of tokens in it."""
        lengths = self.layers[0].cache_bytes_at
        return {length: sum(layer.cache_bytes_at[length] for layer in self.layers) for length in lengths}

    @property
    def numbers_per_layer(self) -> float:
        """Cached numbers per token, the mean over the layers that have any; whole where it is whole."""
        numbers = [layer.cached_numbers for layer in self.layers if layer.cached_numbers]
        mean = sum(numbers) / len(numbers)
        return int(mean) if mean == int(mean) else mean

    def to_dict(self) -> dict[str, Any]:
        """The bytes under their stable JSON names."""
        names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once", "cache_bytes_at")
        layers = [{"layer": index} | asdict(layer) for index, layer in enumerate(self.layers)]
        return {name: getattr(self, name) for name in names} | {"layers": layers}


def account(spec: ModelSpec, lengths: Iterable[int] | None = None) -> Account:
    """Counts the bytes of a model, before or after any step.

    Args:
        spec: the model; its weights are counted where its own byte fields are filled in (``sized``).
        lengths: tokens at which the cache is told. Default: ``told_lengths``.
    """
    lengths = tuple(told_lengths(spec) if lengths is None else lengths)
    return Account(
        layers=tuple(_layer_account(layer, spec, lengths) for layer in spec.layers), outside_bytes=spec.outside_bytes
    )


def told_lengths(spec: ModelSpec) -> list[int]:
    """Numbers of tokens at which sizes are told: the usual ones that the model's context holds, and the context."""
    context = spec.max_position_embeddings
    return [*(length for length in LENGTHS if length < context), context]


def reduced_bytes(spec: ModelSpec, times: int, length: int) -> float:
    """Bytes at ``length`` tokens of a cache with so many times fewer bytes than keys and values have."""
    grouped = [LayerSpec(attention=replace(attention, cached_heads=0)) for attention in spec.attention_layers.values()]
    return sum(slot_bytes(slot, length, spec.dtype) for layer in grouped for slot in layer.slots) / times


def in_dtype(spec: ModelSpec, dtype: str | None) -> ModelSpec:
    """The same model, saved in ``dtype`` (None: as it is); all its weights are taken to be floats."""
    if dtype is None or dtype == spec.dtype:
        return spec
    new, old = DTYPE_BYTES[dtype], DTYPE_BYTES[spec.dtype]

    def scaled(size: int | None) -> int | None:
        return None if size is None else size * new // old

    layers = tuple(
        replace(layer, attention_bytes=scaled(layer.attention_bytes), other_bytes=scaled(layer.other_bytes))
        for layer in spec.layers
    )
    return replace(spec, dtype=dtype, layers=layers, outside_bytes=scaled(spec.outside_bytes))


def number_bits(codec: str, dtype: str) -> int:
    """Bits of a cached number as its slot's codec stores it, in a model of ``dtype``."""
    return {"plain": 8 * DTYPE_BYTES[dtype], "byte": 8, "index": 8 * INDEX_BYTES}[codec]


def slot_bytes(slot: Slot, length: int, dtype: str) -> int:
    """Bytes that a slot holds once ``length`` tokens are read, in a model of ``dtype``."""
    return slot.held(length) * slot.width * number_bits(slot.codec, dtype) // 8


def _layer_account(layer: LayerSpec, spec: ModelSpec, lengths: tuple[int, ...]) -> LayerAccount:
    lasting, once = ([slot for slot in layer.slots if slot.once == kind] for kind in (False, True))
    return LayerAccount(
        weight_bytes=_layer_bytes(layer, spec),
        cache_bytes_per_token=sum(slot_bytes(replace(slot, tokens=None), 1, spec.dtype) for slot in lasting),
        cache_bytes_once=sum(slot_bytes(replace(slot, until=None), slot.tokens or 0, spec.dtype) for slot in once),
        cache_bytes_at={str(at): sum(slot_bytes(slot, at, spec.dtype) for slot in layer.slots) for at in lengths},
        cached_numbers=sum(slot.width for slot in lasting),
    )


def _layer_bytes(layer: LayerSpec, spec: ModelSpec) -> int | None:
    """Bytes of all weights of a layer; None where they are not known."""
    if layer.other_bytes is None:
        return None
    if layer.attention is None or layer.replaced is None or layer.integers is not None:
        return None if layer.attention_bytes is None else layer.attention_bytes + layer.other_bytes
    if not layer.attention.scaling:  # only its config was read, which says nothing of norms
        return None
    return layer.other_bytes + attention_bytes(layer, spec.hidden_size, spec.dtype) - _packed_away(layer, spec.dtype)


def _packed_away(layer: LayerSpec, dtype: str) -> int:
    """Bytes that packing took off the converted attention of a layer; what is beside it was counted as stored."""
    if (packed := layer.packed) is None:
        return 0
    inside, width = f"{layer.module}.".removeprefix(f"{packed.layer}."), DTYPE_BYTES[dtype]
    return packed.dense_size(width, inside) - packed.size(width, inside)


def no_cache(lengths: Iterable[int]) -> LayerAccount:
    """A layer that caches nothing whose size a length changes."""
    return LayerAccount(cache_bytes_at={str(length): 0 for length in lengths})


def measured_layer(layer: Any, lengths: Iterable[int], width: float = 1) -> LayerAccount:
    """Measures a layer of a DynamicCache that holds some tokens; one without keys holds nothing that is counted.

    The layer itself says how much it holds at each length: a copy of it on the meta device is given so many tokens.

    Args:
        layer: the layer; it stays as it is.
        lengths: tokens at which it is told.
        width: bytes of a number in the checkpoint's dtype over those in the one computed in; the first are told.
    """
    if getattr(layer, "keys", None) is None:
        return no_cache(lengths)

    def held(tensors: Iterable[Any]) -> int:
        return sum(int(tensor.nbytes * (width if tensor.is_floating_point() else 1)) for tensor in tensors)

    windows = [room.sliding_window for name in ROOMS if (room := getattr(layer, name, None)) is not None]
    full = max([getattr(layer, "first_tokens", 0), *windows])
    tokens = [tensor[:1, ..., :1, :] for tensor in (layer.keys, layer.values)]
    return LayerAccount(
        cache_bytes_per_token=held(tokens),
        cache_bytes_once=held(_grown(layer, full)[2:]) if full else 0,
        cache_bytes_at={str(at): held(_grown(layer, at)) for at in lengths},
        cached_numbers=sum(tensor.numel() for tensor in tokens),
    )


def _grown(layer: Any, length: int) -> list[Any]:
    """What ``layer`` holds of one sequence of ``length`` tokens: keys and values, then those of exact tokens."""
    found = copy.copy(layer)
    inner = {name: copy.copy(room) for name in ROOMS if (room := getattr(layer, name, None)) is not None}
    vars(found).update(inner)
    rooms = [found, *inner.values()]
    given: list[Any] = [
        [tensor[:1, :, :1].to("meta").expand(-1, -1, length, -1) for tensor in (room.keys, room.values)]
        for room in rooms
    ]
    if (blank := getattr(layer, "blank", None)) is not None:
        tokens = [states.cpu().expand(-1, length, -1) for states in blank[:2]]
        given[1:] = [blank._replace(keys=tokens[0], values=tokens[1])]
    for room in rooms:
        room.keys, room.values, room.is_initialized = None, None, False
        if hasattr(room, "cumulative_length"):
            room.cumulative_length = 0
    found.first = None
    found.update(*given[0], *given[1:])
    return [tensor for room in rooms for tensor in (room.keys, room.values)] + [*(found.first or ())]


def measure(model: Any, lengths: Iterable[int] = (), tokens: int = PROBE_TOKENS) -> Account:
    """Measures every tensor that ``model`` saves, tied ones once, and the cache that ``tokens`` tokens fill.

    Bytes are told in the checkpoint's dtype, ``model.config.dtype``, where the model computes in a wider one.

    Args:
        model: a causal or vision-language model of transformers, converted or not.
        lengths: tokens at which the cache is told.
        tokens: how many run through the model.
    """
    import torch

    from anymla.model_run.stream import decoder_layers
    from anymla.modeling.arguments import cache_of

    lengths = tuple(lengths)
    width = (model.config.dtype or model.dtype).itemsize / model.dtype.itemsize
    layers, weights = decoder_layers(model), _tensors(model)
    inside = [{name for name in _tensors(layer) if name in weights} for layer in layers]
    sizes = {
        name: int(tensor.nbytes * (width if tensor.is_floating_point() else 1)) for name, tensor in weights.items()
    }
    with torch.no_grad():  # packed weights are unpacked when they first run
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        cached = cache_of(model(input_ids=ids, use_cache=True)).layers
    outside = sum(sizes.values()) - sum(sizes[name] for names in inside for name in names)
    return Account(
        layers=tuple(
            replace(measured_layer(layer, lengths, width), weight_bytes=sum(sizes[name] for name in names))
            for layer, names in zip_longest(cached, inside)  # MiniMax' last linear layers have none in its cache
        ),
        outside_bytes=outside,
    )


def _tensors(module: Any) -> dict[int, Any]:
    """All that a module saves, by identity: tied tensors are one."""
    return {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}

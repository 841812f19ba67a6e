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

from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.grouped_spec import GroupedSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.shared_spec import SharedSpec
from anymla.modeling.slot_spec import Slot
from anymla.modeling.spec import DTYPE_BYTES, LayerSpec, ModelSpec

LENGTHS = (4096, 32768)  # tokens at which sizes are told, beside the model's context
PROBE_TOKENS = 8  # that run through a model whose cache is measured
INDEX_BYTES = 8  # of an int64
ROOMS = ("exact", "latest")  # of a cache layer, for the last tokens' own keys and values
ANGLE_BYTES = 4  # of a rope pair's turn per position


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
    return sum(_held(slot, length, spec.dtype) for layer in grouped for slot in layer.slots) / times


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


def _held(slot: Slot, length: int, dtype: str) -> int:
    return slot.held(length) * slot.width * number_bits(slot.codec, dtype) // 8


def _layer_account(layer: LayerSpec, spec: ModelSpec, lengths: tuple[int, ...]) -> LayerAccount:
    lasting, once = ([slot for slot in layer.slots if slot.once == kind] for kind in (False, True))
    return LayerAccount(
        weight_bytes=_layer_bytes(layer, spec),
        cache_bytes_per_token=sum(_held(replace(slot, tokens=None), 1, spec.dtype) for slot in lasting),
        cache_bytes_once=sum(_held(replace(slot, until=None), slot.tokens or 0, spec.dtype) for slot in once),
        cache_bytes_at={str(at): sum(_held(slot, at, spec.dtype) for slot in layer.slots) for at in lengths},
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


def attention_bytes(layer: LayerSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter and buffer that a converted attention saves.

    ``hidden``: D, the width of the residual stream.
    """
    match layer.kind:
        case CodedSpec() if layer.latent is not None:
            return latent_bytes(*layer.parts, hidden, dtype) + table_bytes(layer, dtype)
        case CodedSpec() if layer.mfa is not None and layer.attention is not None:
            return mfa_bytes(layer.attention, layer.mfa, hidden, dtype) + table_bytes(layer, dtype)
        case CodedSpec():
            return coded_bytes(layer, hidden, dtype)
        case LatentSpec() if layer.takes_map:
            return value_latent_bytes(layer, hidden, dtype)
        case LatentSpec() as latent:
            return latent_bytes(layer.parts[0], latent, hidden, dtype)
        case GroupedSpec():
            return grouped_bytes(layer, hidden, dtype)
        case MfaSpec() as mfa if layer.attention is not None:
            return mfa_bytes(layer.attention, mfa, hidden, dtype)
        case SharedSpec() as shared if layer.attention is not None:
            return shared_bytes(layer.attention, shared, hidden, dtype)
    raise ValueError(f"the layer at {layer.module} is not converted")


def coded_bytes(layer: LayerSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter and buffer that CodedAttention saves; ``hidden``: D, the residual stream's width."""
    if (attention := layer.attention) is None or (coded := layer.coded) is None:
        raise ValueError(f"the layer at {layer.module} has no coded cache")
    keys, widths = attention.num_kv_heads * attention.head_dim, coded.block_widths(attention)
    sides = (
        (coded.keys, coded.key_basis, layer.encodes_keys, widths[0]),
        (coded.values, coded.value_basis, layer.encodes_values, widths[1]),
    )
    numbers = _plain_numbers(attention, hidden)
    for side, basis, encodes, width in sides:  # projection, encoder, decoder
        numbers += (hidden + 1) * (keys if encodes else side.width)
        numbers += ((keys + 1) * width if side.width == width else (width + 1) * keys) * encodes
        numbers += (width + 1) * keys * (basis != "own")
    channels = attention.num_kv_heads * attention.rope_pairs * (coded.key_basis == "channels")
    return numbers * DTYPE_BYTES[dtype] + channels * INDEX_BYTES + table_bytes(layer, dtype)


def table_bytes(layer: LayerSpec, dtype: str) -> int:
    """Bytes of the buffers that every coded cache has: levels, and the angles of rope."""
    levels = layer.codes.keys.table_numbers + layer.codes.values.table_numbers
    return levels * DTYPE_BYTES[dtype] + (layer.attention.rope_pairs if layer.attention else 0) * ANGLE_BYTES


def shared_bytes(attention: AttentionSpec, shared: SharedSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter that MapSourceAttention or SharedAttention saves; ``hidden``: D."""
    keys, queries = attention.num_kv_heads * attention.head_dim, attention.num_heads * attention.head_dim
    numbers = _plain_numbers(attention, hidden, shared.biases) + 2 * (hidden + shared.biases) * keys
    if shared.source_layer is not None:  # no projections of queries and keys
        numbers -= (hidden + shared.biases) * (queries + keys)
    return numbers * DTYPE_BYTES[dtype]


def value_latent_bytes(layer: LayerSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter that SharedLatentAttention saves; ``hidden``: D, the residual stream's width."""
    attention, latent = layer.parts
    values, rank, biased = attention.num_kv_heads * attention.head_dim, latent.kv_lora_rank, latent.biases
    numbers = _plain_numbers(attention, hidden, biased) - (hidden + biased) * attention.num_heads * attention.head_dim
    made = (hidden + 1) * values if layer.makes_values else 0
    numbers += made + ((values if made else hidden) + biased) * rank + values * rank
    return numbers * DTYPE_BYTES[dtype]


def latent_bytes(attention: AttentionSpec, latent: LatentSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter and buffer that LatentAttention, or ExactWindowAttention, saves.

    ``hidden``: D, the width of the residual stream.
    """
    channels = latent.qk_rope_head_dim // 2 * latent.channel_fold
    numbers = _plain_numbers(attention, hidden, latent.biases) + _encoder_numbers(attention, latent, hidden)
    numbers += 2 * attention.num_kv_heads * attention.head_dim * latent.kv_lora_rank  # kv_b_proj
    numbers += 2 * attention.num_heads * attention.rope_pairs  # query_rotation
    numbers += 2 * attention.num_kv_heads * channels
    return numbers * DTYPE_BYTES[dtype] + channels * INDEX_BYTES


def grouped_bytes(layer: LayerSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter that GroupedAttention saves; ``hidden``: D, the residual stream's width."""
    if (attention := layer.attention) is None or (grouped := layer.grouped) is None:
        raise ValueError(f"the layer at {layer.module} has no grouped cache")
    heads, size = attention.num_kv_heads, attention.head_dim
    numbers = _plain_numbers(attention, hidden) + (hidden + 1) * (heads + grouped.kv_heads) * size
    return (numbers + 2 * heads * size * size * grouped.shares_keys) * DTYPE_BYTES[dtype]


def mfa_bytes(attention: AttentionSpec, mfa: MfaSpec, hidden: int, dtype: str) -> int:
    """Bytes of every parameter and buffer that MfaAttention saves; ``hidden``: D, the residual stream's width."""
    heads, queries, value = attention.num_heads, mfa.query_rank(attention), mfa.value_width
    numbers = (hidden + mfa.biases + mfa.query_norm + heads * mfa.query_width) * queries
    numbers += (heads * value + mfa.biases) * hidden + mfa.value_gate * (value + 1) * value
    numbers += attention.kept_numbers + attention.gate * (hidden + 1) + heads * attention.sinks
    latent = LatentSpec(kv_lora_rank=mfa.kv_lora_rank, qk_rope_head_dim=mfa.qk_rope_head_dim, biases=mfa.biases)
    numbers += _encoder_numbers(attention, latent, hidden)
    return numbers * DTYPE_BYTES[dtype] + mfa.qk_rope_head_dim // 2 * INDEX_BYTES


def _plain_numbers(attention: AttentionSpec, hidden: int, biased: bool = True) -> int:
    """Numbers of what any converted attention has: projections of queries and output, norms, gate, sinks, gain."""
    queries = attention.num_heads * attention.head_dim
    numbers = (hidden + biased) * queries + (queries + biased) * hidden + attention.kept_numbers
    numbers += attention.gate * (hidden + 1) + attention.num_heads * attention.sinks
    return numbers + attention.head_dim * attention.query_gain


def _encoder_numbers(attention: AttentionSpec, latent: LatentSpec, hidden: int) -> int:
    """Numbers of what makes latent, rope key, and, for an exact window, keys and values of ``hidden`` dims."""
    keys, rank, windowed = attention.num_kv_heads * attention.head_dim, latent.kv_lora_rank, latent.exact_window > 0
    true_keys = (hidden + 1) * keys  # or values
    window = keys * windowed  # key_mean
    if attention.norms is None and attention.value_norm is None and attention.clip is None:
        cached = rank + latent.qk_rope_head_dim
        return (hidden + latent.biases) * cached + 2 * true_keys * windowed + window
    made = true_keys + keys * (rank + latent.qk_rope_head_dim) + window
    if attention.value_norm is None and attention.clip is None and not windowed:
        return made + (hidden + 1) * rank
    return made + true_keys + (keys + 1) * rank


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

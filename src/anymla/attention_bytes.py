"""Bytes of every kind of converted attention: all the parameters and buffers that it saves. Loads no torch.

D is the width of the residual stream, ``hidden``.
"""

from __future__ import annotations

from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec
from anymla.modeling.grouped_spec import GroupedSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.shared_spec import SharedSpec
from anymla.modeling.spec import DTYPE_BYTES, LayerSpec

INDEX_BYTES = 8  # of an int64
ANGLE_BYTES = 4  # of a rope pair's turn per position


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

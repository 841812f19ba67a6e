"""One converted layer as modeling/fused_attention.py holds it: tensors in, tensors out, float64.

Shapes: D hidden, H query heads, G kv heads, n = H/G, d head_dim, P rope pairs, K channels (R = 2K), r latent rank; with
a prime, as the export has them: zeros fill what a layer does not have, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymla.exports.converted import Layer
from anymla.exports.fold import Sizes, decoder, grown, output_projection

BIASED = ("q_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj", "v_a_proj", "o_proj")
NORMS = {"q_norm": "mla.query_heads.norm", "k_norm": "key_norm", "v_norm": "value_norm"}


def fused_tensors(layer: Layer, tensors: Mapping[str, Tensor], sizes: Sizes, exponent: int) -> dict[str, Tensor]:
    """The tensors of FamilyAttention, from those of LatentAttention (float64) whose layer is ``layer``."""
    heads, d, group = layer.spec.num_heads, layer.spec.head_dim, layer.group
    weight = dict(tensors)
    for name in BIASED:  # a layer may do without: vLLM's has them all
        if f"{name}.weight" in weight:
            weight.setdefault(f"{name}.bias", weight[f"{name}.weight"].new_zeros(len(weight[f"{name}.weight"])))
    made = _queries(layer, weight, query_maps(layer, weight, sizes)) | _encoder(layer, weight, sizes)
    made |= {
        "mla.kv_a_layernorm.weight": torch.full((sizes.rank,), 2.0**exponent, dtype=torch.float64),
        "mla.kv_b_proj.weight": decoder(weight["kv_b_proj.weight"], d, group, sizes),
        "mla.o_proj.weight": output_projection(weight["o_proj.weight"], heads, sizes),
        "mla.o_proj.bias": weight["o_proj.bias"],
        "channel_select": _channel_select(layer, weight, sizes),
    }
    for old, new in NORMS.items():
        made |= {f"{new}{name[len(old) :]}": tensors[name] for name in tensors if name.startswith(f"{old}.")}
    return made


def query_maps(layer: Layer, weight: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """[H,N'+R',d]: from a head's query to what meets its position-free keys and what meets the channels.

    The first part applies the expected rotation. A channel's query is a sum of the pairs that it carries, times
    complex weights: multiplications that commute with rope, which comes after. Both hold the scale of scores, so that
    what is left for engines is the usual one: vLLM's prefill takes one for all layers.
    """
    d, pairs, heads = layer.spec.head_dim, layer.spec.rope_pairs, layer.spec.num_heads
    real, imag = weight["query_rotation"]
    p = torch.arange(pairs)
    nope = torch.eye(d, dtype=torch.float64).repeat(heads, 1, 1)
    nope[:, p, p] = nope[:, p + pairs, p + pairs] = real
    nope[:, p, p + pairs], nope[:, p + pairs, p] = -imag, imag
    index, half = weight["channel_index"], sizes.rope // 2
    kept = layer.latent.qk_rope_head_dim // 2
    real, imag = weight["channel_weight"].repeat_interleave(heads // layer.spec.num_kv_heads, dim=1)  # [H, reads]
    channels = torch.zeros(heads, 2 * half, d, dtype=torch.float64)
    for read, pair in enumerate(index.tolist()):  # several reads are summed where channels are folded
        channel = read % kept
        channels[:, channel, pair] += real[:, read]
        channels[:, channel, pair + pairs] -= imag[:, read]
        channels[:, half + channel, pair] += imag[:, read]
        channels[:, half + channel, pair + pairs] += real[:, read]
    return torch.cat([grown(nope, sizes.nope), channels], dim=1) * (float(layer.spec.scaling) / sizes.scale)


def _queries(layer: Layer, weight: Mapping[str, Tensor], maps: Tensor) -> dict[str, Tensor]:
    """The maps folded into the projection; beside it where a norm or a clip stands between."""
    if not layer.spec.linear_queries:
        return {
            "mla.q_proj.weight": weight["q_proj.weight"],
            "mla.q_proj.bias": weight["q_proj.bias"],
            "mla.query_heads.maps": maps,
        }
    heads = len(maps)
    return {
        "mla.q_proj.weight": (maps @ weight["q_proj.weight"].unflatten(0, (heads, -1))).flatten(0, 1),
        "mla.q_proj.bias": (maps @ weight["q_proj.bias"].view(heads, -1, 1)).flatten(),
    }


def _encoder(layer: Layer, weight: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """What makes latent and channels, rows and columns grown to the export's sizes."""
    made = {}
    if not layer.spec.linear_keys:
        keys, values = weight["k_a_proj_with_mqa.weight"], weight["v_a_proj.weight"]
        rows, bias = torch.cat([keys, grown(values, len(keys))], dim=1), weight["v_a_proj.bias"]
        bias = pad(bias, (0, len(keys) - len(bias)))
        made = {f"key_proj.{name}": weight[f"k_proj.{name}"] for name in ("weight", "bias")}
        if not layer.spec.linear_values:
            made |= {f"value_proj.{name}": weight[f"v_proj.{name}"] for name in ("weight", "bias")}
    else:
        rows, bias = weight["kv_a_proj_with_mqa.weight"], weight["kv_a_proj_with_mqa.bias"]
    rank, half = layer.latent.kv_lora_rank, sizes.rope // 2
    rows = torch.cat([rows, bias[:, None]], dim=1)
    latent, channels = grown(rows[:rank], sizes.rank), rows[rank:].unflatten(0, (2, -1))
    rows = torch.cat([latent, grown(channels, half).flatten(0, 1)])
    return made | {"mla.kv_a_proj_with_mqa.weight": rows[:, :-1], "mla.kv_a_proj_with_mqa.bias": rows[:, -1]}


def _channel_select(layer: Layer, weight: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """[P,K']: a one where a channel turns with a pair's frequency."""
    select = torch.zeros(layer.spec.rope_pairs, sizes.rope // 2, dtype=torch.float64)
    turns = weight["channel_index"][: layer.latent.qk_rope_head_dim // 2]
    select[turns, torch.arange(len(turns))] = 1.0
    return select

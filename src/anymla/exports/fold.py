"""One converted attention as DeepSeek's: tensors in, tensors out, float64 (docs/exporting.md).

Shapes as in converted.py; r', R', n', v' are the sizes as written: at least r, R, d, d, with zeros in the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymla.exports.converted import Layer
from anymla.modeling.heads import multiply_pairs

NORM_EPS = 1e-6  # of the latent's norm: transformers has no other there
READ = (  # tensors of LatentAttention that this takes
    *("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"),
    *("query_rotation", "channel_weight", "channel_index"),
)
NEGLIGIBLE = 2.0**-24  # the most that the neutralised norm may change a latent, as a share of it


@dataclass(frozen=True)
class Sizes:
    """kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim and v_head_dim as they are written."""

    rank: int
    rope: int
    nope: int
    value: int

    @property
    def scale(self) -> float:
        """Returns what engines multiply scores by."""
        return float((self.nope + self.rope) ** -0.5)


def channel_slots(channels: int, rope: int) -> Tensor:
    """Returns which of the R'/2 pairs each of K channels takes: evenly spaced from the first."""
    return torch.arange(channels) * (rope // 2 // max(channels, 1))


def deepseek_attention(
    tensors: Mapping[str, Tensor], layer: Layer, sizes: Sizes, norm: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of DeepseekV3Attention, float64.

    ``tensors``: those of ``READ``. ``norm`` [D]: weight of the norm before it, which bounds the latents.
    ``dtype``: in which they will be stored.
    """
    turns = tensors["channel_index"][: layer.latent.qk_rope_head_dim // 2]
    order, rank = turns.argsort(), layer.latent.kv_lora_rank
    rows = tensors["kv_a_proj_with_mqa.weight"]
    latent, rope = rows[:rank], rows[rank:].unflatten(0, (2, -1))[:, order]
    shrink = 2.0 ** -_norm_shift(latent * norm)
    weight = torch.tensor(NORM_EPS**0.5 / shrink).to(dtype).double()
    kv_a = torch.cat([grown(latent * shrink, sizes.rank), _interleaved(rope, sizes.rope)])
    group = layer.group
    up = tensors["kv_b_proj.weight"] * (NORM_EPS**0.5 / (shrink * weight))
    return {
        "q_proj.weight": _queries(tensors, layer, sizes, order),
        "kv_a_proj_with_mqa.weight": kv_a,
        "kv_a_layernorm.weight": weight.expand(sizes.rank).clone(),
        "kv_b_proj.weight": decoder(up, layer.spec.head_dim, group, sizes),
        "o_proj.weight": output_projection(tensors["o_proj.weight"], layer.spec.num_heads, sizes),
    }


def _norm_shift(latent: Tensor) -> int:
    """The k for which latents times 2^-k are far below sqrt(eps): RMSNorm then divides them by sqrt(eps) and no more.

    ``latent`` [r,D] makes them of a vector whose mean square is at most 1, so their squares sum to at most
    D sigma^2, sigma the largest singular value. The norm errs by half their mean square over eps, at most.
    """
    largest = torch.linalg.matrix_norm(latent, 2).square() * latent.shape[1] / latent.shape[0]
    return max(0, math.ceil(math.log2(max(largest.item(), 1e-30) / (2 * NEGLIGIBLE * NORM_EPS)) / 2))


def _queries(tensors: Mapping[str, Tensor], layer: Layer, sizes: Sizes, order: Tensor) -> Tensor:
    """[H (n' + R'), D]: expected rotation, channel weights and the scale of scores folded into W_q."""
    d, pairs, fold = layer.spec.head_dim, layer.spec.rope_pairs, layer.latent.channel_fold
    group = layer.group
    query = tensors["q_proj.weight"].unflatten(0, (-1, d)).mT  # [H,D,d]
    real, imag = tensors["query_rotation"].unsqueeze(-2)
    nope = torch.cat([multiply_pairs(query[..., : 2 * pairs], real, imag), query[..., 2 * pairs :]], dim=-1)
    dims = torch.cat([tensors["channel_index"], tensors["channel_index"] + pairs])
    weight = tensors["channel_weight"].repeat_interleave(group, dim=1).unsqueeze(-2)
    channels = multiply_pairs(query[..., dims], weight[0], weight[1]).unflatten(-1, (2, fold, -1)).sum(-2)
    rope = _interleaved(channels[..., order].permute(2, 3, 0, 1), sizes.rope)  # [R',H,D]
    rows = torch.cat([grown(nope.mT, sizes.nope), rope.transpose(0, 1)], dim=1)
    return rows.flatten(0, 1) * (layer.spec.scaling / sizes.scale)


def _interleaved(pairs: Tensor, rope: int) -> Tensor:
    """[2,K,...] real and imaginary parts as [R',...], a pair's two next to each other, zeros between."""
    slots = channel_slots(pairs.shape[1], rope)
    placed = pairs.new_zeros(rope // 2, 2, *pairs.shape[2:])
    placed[slots] = pairs.transpose(0, 1)
    return placed.flatten(0, 1)


def decoder(up: Tensor, d: int, group: int, sizes: Sizes) -> Tensor:
    """W_uk and W_uv [2Gd,r] of KV heads as [H (n' + v'), r'], a copy for each of the ``group`` query heads."""
    heads = up.unflatten(0, (-1, 2, d)).repeat_interleave(group, dim=0)  # [H,2,d,r]
    key, value = heads.unbind(1)
    return torch.cat([grown(key, sizes.nope, sizes.rank), grown(value, sizes.value, sizes.rank)], dim=1).flatten(0, 1)


def output_projection(weight: Tensor, heads: int, sizes: Sizes) -> Tensor:
    """W_o [D,H d] as [D,H v']."""
    return grown(weight.unflatten(1, (heads, -1)), heads, sizes.value).flatten(1)


def grown(matrix: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """``matrix`` [..,a,b] with zeros below and to the right: [..,rows,columns], or [..,rows,b]."""
    right = 0 if columns is None else columns - matrix.shape[-1]
    return pad(matrix, (0, right, 0, rows - matrix.shape[-2]))

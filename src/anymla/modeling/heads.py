"""What families do to heads and scores around attention: norms, rope tables, soft-caps, sinks, position biases.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

Shapes: B batch, T new tokens, S cached tokens, H query heads, N heads, d head_dim, P rope pairs. A vector of pairs is
stored half-split, [real parts | imaginary parts], as Llama stores its rope pairs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .absorbed import additive_mask
from .attention_spec import AttentionSpec, Temperature

DROPOUTS = (  # a number or a Dropout, on attention weights and on the output
    ("attention_dropout", "attn_dropout", "attn_dropout_p", "attn_pdrop"),
    ("resid_dropout", "out_drop", "hidden_dropout", "output_dropout"),
)


def multiply_pairs(pairs: Tensor, real: Tensor, imag: Tensor) -> Tensor:
    """Complex product of half-split pairs [..., 2N] with factors [..., N] given by their parts."""
    re, im = pairs.chunk(2, dim=-1)
    return torch.cat([re * real - im * imag, re * imag + im * real], dim=-1)


def split_heads(
    states: Tensor, head_dim: int, *, clip: float | None = None, norm: Any = None, norm_over: str = "head"
) -> Tensor:
    """Projected states [B,T,N d] as heads [B,N,T,d], clipped and normalised as the family does it.

    ``norm_over``: 'width' takes all heads of a token as one vector, 'head' each [.., N, d], 'heads-first' [B,N,T,d].
    """
    if norm is not None and norm_over == "width":
        states = norm(states)
    if clip is not None:
        states = states.clamp(-clip, clip)
    heads = states.unflatten(-1, (-1, head_dim))
    if norm is not None and norm_over == "head":
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    return norm(heads) if norm is not None and norm_over == "heads-first" else heads


def rope_tables(
    kind: str, pairs: int, position_embeddings: Any, position_ids: Tensor | None, like: Tensor, config: Any = None
) -> tuple[Tensor, Tensor]:
    """Cos and sin [B or 1,1,T,P] out of what the family hands to its attention, in the dtype of ``like`` [B,T,D].

    ``kind``: 'halves' (cos, sin), each pair's once in the first P columns; 'repeated' (cos, sin), each twice in a row;
    'backwards' the same as 'halves', turned the other way; 'either' one of the first two, as the release of
    transformers has it; 'complex' e^{i t theta}; 'sinusoids' (sin, cos), each pair's once, or in older releases nothing
    but positions, base 10000; 'none' no rope at all.
    Tables of M-RoPE may come one per axis, [axes,B,T,d] in halves: ``config`` says which pairs go by which axis.
    """
    if kind == "none":
        empty = like.new_zeros(1, 1, like.shape[1], 0)
        return empty, empty
    if kind == "complex":
        cos, sin = position_embeddings.real, position_embeddings.imag
    elif kind == "sinusoids" and position_embeddings is not None:  # transformers from 5.24 on
        sin, cos = position_embeddings
    elif kind == "sinusoids":
        if position_ids is None:
            raise ValueError("this family's attention needs position_ids")
        frequencies = 1.0 / (10000 ** (torch.arange(0, 2 * pairs, 2, device=position_ids.device) / (2 * pairs)))
        angles = position_ids[..., None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
    else:
        cos, sin = _pair_columns(kind, pairs, *position_embeddings)
        if cos.dim() == 4:
            sections = config.rope_parameters["mrope_section"]
            cos, sin = (
                torch.cat([part[i % len(part)] for i, part in enumerate(table.split(sections, -1))], -1)
                for table in (cos, sin)
            )
        sin = -sin if kind == "backwards" else sin
    return cos.unsqueeze(1).to(like.dtype), sin.unsqueeze(1).to(like.dtype)


def _pair_columns(kind: str, pairs: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair's column of tables [..., 2P] that hold it twice."""
    halves = cos[..., :pairs], sin[..., :pairs]
    if kind not in ("repeated", "either"):
        return halves
    repeated = cos[..., : 2 * pairs : 2], sin[..., : 2 * pairs : 2]
    if kind == "repeated":
        return repeated
    is_repeated = (sin[..., : 2 * pairs : 2] == sin[..., 1 : 2 * pairs : 2]).all()  # stays on the device
    return torch.where(is_repeated, repeated[0], halves[0]), torch.where(is_repeated, repeated[1], halves[1])


def query_temperature(positions: Tensor, temperature: Temperature) -> Tensor:
    """1 + scale log(1 + floor((t + offset) / period)), [B or 1,1,T,1] (Llama 4, Ministral 3)."""
    steps = torch.floor((positions.double() + temperature.offset) / temperature.period)
    return (1 + temperature.scale * torch.log1p(steps))[:, None, :, None]


def attention_weights(scores: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Probabilities [B,H,T,S] of scaled scores; soft-capped, masked (additive), with a sink logit per head [H]."""
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores + mask
    length = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :length].to(scores.dtype)


def causal_mask(new: int, length: int, window: int | None, device: Any) -> Tensor:
    """Bool [1,1,T,S]: the last T of S tokens attend to themselves and to what came before, within ``window``."""
    ones = torch.ones(new, length, dtype=torch.bool, device=device)
    mask = ones.tril(length - new)
    return (mask if window is None else mask & ones.triu(length - new - window + 1))[None, None]


def score_bias(
    mask: Tensor | None, spec: AttentionSpec, config: Any, hidden_states: Tensor, length: int, inputs: dict[str, Any]
) -> Tensor | None:
    """The mask, with what the family puts on scores by position; ``inputs`` are the other arguments of its attention.

    ``spec.position_bias``: 'alibi' BLOOM's [B H,1,S]; 'scaled-alibi' Falcon's, which its mask already holds but for
    eager attention; 'mpt' [H,1,longest], with a mask that says what is NOT attended to; 'window' a local window that
    the mask does not hold (GPT-Neo).
    """
    kind, dtype = spec.position_bias, hidden_states.dtype
    alibi = inputs.pop("alibi", None)
    bias = inputs.pop("position_bias", None)
    if kind == "window":
        bias = causal_mask(hidden_states.shape[1], length, spec.local_window, hidden_states.device)
    elif kind == "alibi" or (kind == "scaled-alibi" and config._attn_implementation == "eager"):
        bias = alibi.reshape(-1, spec.num_heads, *alibi.shape[-2:]) * (spec.scaling if kind == "scaled-alibi" else 1)
    elif kind == "mpt":
        bias, mask = bias[None, :, :, -length:], None if mask is None else ~mask
    if kind is None or bias is None:
        return mask
    bias = additive_mask(bias, dtype)
    return bias if mask is None else additive_mask(mask, dtype) + bias


def dropout_rates(module: Any) -> tuple[float, float]:
    """The rates of ``module``, on attention weights and on its output, whatever it calls them."""
    each = [next((getattr(module, name) for name in names if hasattr(module, name)), 0.0) for names in DROPOUTS]
    attention, output = (float(getattr(found, "p", found)) for found in each)
    return attention, output


def taken(original: Any, name: str | None) -> Any:
    """A copy of the part ``name`` of ``original``: conversion may permute its weights while the original is in use."""
    return None if name is None else copy.deepcopy(getattr(original, name))


def window_of(original: Any, config: Any, layer: int) -> int | None:
    """The sliding window of ``layer``: none where the config says so, else the module's own, else the config's.

    Mistral's modules read theirs from the config; EXAONE's keep the config's even in layers with full attention.
    """
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    window: int | None = getattr(original, "sliding_window", getattr(config, "sliding_window", None))
    return window

"""Attention of few new tokens over rows of codes on a CPU, in C; torch is the reference, and does where C does not run.

One of the modelling files that travel with every converted checkpoint; c_attention.py has what runs, c_library.py
compiles it, and c_rows.py says how C reads rows.

Shapes: B batch, H query heads, T new tokens, S cached tokens, g groups of heads, R queries of a group (its heads, T
each), w coefficients of a group, P rope pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .c_library import TILE, loaded
from .c_rows import Side, address, first_numbers, side_of, threads_for
from .placed_tokens import Places, Run


class Turning(NamedTuple):
    """How keys turn with their columns: angles of tiles of ``TILE`` columns, and what turns."""

    pairs: Tensor  # int32 [3,n]: places of the real and of the imaginary part among all numbers, and the rope pair
    wave: Tensor  # [2,P,TILE]: cos and sin of the columns of a tile
    starts: Tensor  # [tiles or more,2,P]: of the first column of each tile
    used: Tensor | None  # int32: the coefficients of coded tokens that may not be zero, turned if they are keys


class Keys(NamedTuple):
    """Rows of keys, and the queries that meet them."""

    codec: Any
    rows: Tensor  # [B,S,row_bytes]
    query: Tensor  # [B,g,R,w], turned by its own positions
    turning: Turning  # of what a query meets: coefficients, or the keys rebuilt of them
    of_mean: Tensor | None = None  # [B,g,R,2 P], turned likewise: what meets cos and sin of a column
    decoder: tuple[Tensor, Tensor] | None = None  # weight [n,m] and constant [n]: blocks of rows meet m coefficients
    second: bool = False  # whether these are the second row of a token: those are the numbers of exact tokens, too


class Values(NamedTuple):
    """Rows of values, in so many groups of coefficients; no rows: what the first keys were read as."""

    groups: int
    codec: Any = None
    rows: Tensor | None = None


class Softmax(NamedTuple):
    """How scores become weights."""

    new: int = 1  # T
    mask: Tensor | None = None  # additive, what is broadcast to [B,H,T,S]
    constant: Tensor | None = None  # [B,H,T,1], added to all scores of a query
    softcap: float | None = None
    sinks: Tensor | None = None  # [H], logits of a key without a value


class _Keys(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("pair", "wave", "starts", "decoder", "constant", "query", "of_mean", "every")
        ),
        *((name, ctypes.c_int64) for name in ("pairs", "frequencies", "groups", "rows", "numbers", "block")),
    )


class _Softmax(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "constant", "mask", "sinks")),
        *((name, ctypes.c_int64) for name in ("mask_batch", "mask_head", "mask_query", "new", "groups", "rows")),
        ("softcap", ctypes.c_double),
    )


def tiles_of(rows: Tensor) -> int:
    """Tiles that angles are made for: a growing cache makes few tables."""
    return 1 << (rows.shape[1] // TILE).bit_length()


def attend_in_c(
    keys: Sequence[Keys],
    values: Values,
    exact: Sequence[Places | Run],
    dtype: torch.dtype,
    softmax: Softmax,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all rows, each of which is read once.

    Args:
        keys: their scores are added up. The first are not turned if they are the values, too.
        values: what is weighed.
        exact: what belongs in some columns instead of coded tokens: at most one of a kind, and a run counts last.
        dtype: what rounds levels.
        softmax: how scores become weights.

    Returns:
        Coefficients of values [B,g R,w], and the weight [B,g R] that sinks leave to them.
    """
    batch, length, first = len(keys[0].rows), keys[0].rows.shape[1], keys[0].query
    rows = first.shape[1] * first.shape[2]
    pairs = [_keys_of(each, exact, dtype) for each in keys]
    held = [each for _, _, tensors in pairs for each in tensors]
    side, codec = None, keys[0].codec if values.rows is None else values.codec
    if values.rows is not None:
        side, of_side = side_of(codec, values.rows, exact, dtype, values=True)
        held += of_side
    of_softmax, of_scores = _softmax_of(softmax, side, values.groups, (batch, rows, length))
    held += of_scores
    context, share = first.new_empty(batch, rows, codec.width // values.groups), first.new_empty(batch, rows)
    of_rows, of_keys = _places([own for own, _, _ in pairs]), _places([own for _, own, _ in pairs])
    sizes = (batch, length, threads_for(batch * length))
    loaded().anymla_attend(
        of_rows, of_keys, len(pairs), ctypes.byref(of_softmax), address(context), address(share), *sizes
    )
    del held
    return context, share


def _softmax_of(
    softmax: Softmax, values: Side | None, groups: int, scores: tuple[int, int, int]
) -> tuple[_Softmax, list[Tensor | None]]:
    """How C makes weights of ``scores`` of these sizes [B,rows,S], and the tensors that it points to."""
    (batch, rows, length), (new, mask, constant, softcap, sinks) = scores, softmax
    strides = [0, 0, 0]
    if mask is not None:
        mask = mask.float().expand(batch, rows // new, new, length)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = [*mask.stride()[:3]]
    constant = None if constant is None else constant.contiguous()
    sinks = None if sinks is None else sinks.float().repeat_interleave(rows // len(sinks))
    addresses = (None if values is None else ctypes.addressof(values), *map(address, (constant, mask, sinks)))
    found = _Softmax(*addresses, *strides, new, groups, rows // groups, softcap or 0.0)
    return found, [constant, mask, sinks]


def _keys_of(keys: Keys, exact: Sequence[Places | Run], dtype: torch.dtype) -> tuple[Side, _Keys, list[Tensor | None]]:
    """How C reads rows of keys, what meets them, and the tensors that both point to."""
    turning, (groups, queries) = keys.turning, keys.query.shape[1:3]
    side, held = side_of(keys.codec, keys.rows, exact, dtype, values=keys.second, used=turning.used)
    weight, constant = (None, None) if keys.decoder is None else (part.contiguous() for part in keys.decoder)
    numbers = keys.codec.width if weight is None else len(weight)
    of_mean = None if keys.of_mean is None else keys.of_mean.contiguous()
    every = first_numbers(max(numbers, 2 * turning.wave.shape[1]))
    tensors = [*turning[:3], weight, constant, keys.query.contiguous(), of_mean, every]
    found = _Keys(
        *(address(each) for each in tensors),
        *(turning.pairs.shape[1], turning.wave.shape[1], groups, queries),
        *(numbers, 0 if weight is None else weight.shape[1]),
    )
    return side, found, [*held, *tensors]


def _places(structures: Sequence[ctypes.Structure]) -> Any:
    """The addresses of structures, as C takes them."""
    return (ctypes.c_void_p * len(structures))(*(ctypes.addressof(each) for each in structures))

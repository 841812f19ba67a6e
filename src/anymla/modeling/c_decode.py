"""Attention of few new tokens over rows of codes on a CPU, in C; torch is the reference, and does where C does not run.

One of the modelling files that travel with every converted checkpoint; c_attention.py and c_encoding.py have what runs,
and c_library.py compiles it.

Shapes: B batch, H query heads, T new tokens, S cached tokens, g groups of heads, R queries of a group (its heads, T
each), w coefficients of a group, P rope pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .c_library import TILE, library, loaded
from .code_layout import code_layout, grid_levels
from .coding_spec import Coding
from .placed_tokens import Places, Run

_NONE = torch.empty(0, dtype=torch.long, device="cpu")
_NO_NUMBERS = torch.empty(0, dtype=torch.float32, device="cpu")


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


class Weighing(NamedTuple):
    """What becomes of scores until they weigh values."""

    mask: Tensor | None = None  # additive, [B or 1,H or 1,T,S]
    constant: Tensor | None = None  # [B,H,T,1], added to all scores of a query
    softcap: float | None = None
    sinks: Tensor | None = None  # [H], logits of a key without a value


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "places", "bits", "levels")),
        *((name, ctypes.c_void_p) for name in ("exact_row", "exact_column", "exact_numbers", "run", "used", "every")),
        *((name, ctypes.c_int64) for name in ("row_step", "token_step", "byte_step", "width", "row_bytes")),
        *(
            (name, ctypes.c_int64)
            for name in ("outliers", "scale", "block", "exact", "run_first", "run_length", "useds")
        ),
    )


class _Keys(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("pair", "wave", "starts", "decoder", "constant", "query", "of_mean", "every")
        ),
        *((name, ctypes.c_int64) for name in ("pairs", "frequencies", "groups", "rows", "numbers", "block")),
    )


class _Weighing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "constant", "mask", "sinks")),
        *((name, ctypes.c_int64) for name in ("mask_batch", "mask_head", "mask_query", "new", "groups", "rows")),
        ("softcap", ctypes.c_double),
    )


def runs_in_c(query: Tensor, *codecs: Any) -> bool:
    """Whether C reads rows of these codecs for float32 queries: on a CPU, without gradients."""
    plain = any(codec.coding.kind == "plain" for codec in codecs)
    if query.device.type != "cpu" or query.dtype != torch.float32 or plain:
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and library() is not None


def tiles_of(rows: Tensor) -> int:
    """Tiles that angles are made for: a growing cache makes few tables."""
    return 1 << (rows.shape[1] // TILE).bit_length()


def encoded(codec: Any, x: Tensor) -> Tensor:
    """What ``codec`` makes of coefficients [..,n]: by tables in C, where C runs."""
    if codec.coding.kind != "table" or not runs_in_c(x.new_empty(0, dtype=torch.float32), codec):
        made: Tensor = codec.encode(x)
        return made
    numbers = x.reshape(-1, codec.width).float().contiguous()
    rows = torch.zeros(len(numbers), codec.row_bytes, dtype=torch.uint8, device=x.device)
    side, held = _side(codec, rows[None], (), torch.float32, values=False)
    held += [numbers, steps := codec.steps()]
    places = (_address(numbers), _address(steps), _address(rows), len(rows), _threads(len(rows)))
    loaded().anymla_encode(ctypes.byref(side), *places)
    del held
    return rows.view(*x.shape[:-1], codec.row_bytes)


def attend_in_c(
    keys: Sequence[Keys],
    values: Values,
    exact: Sequence[Places | Run],
    dtype: torch.dtype,
    weighing: Weighing,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all rows, each of which is read once.

    Args:
        keys: their scores are added up. The first are not turned if they are the values, too.
        values: what is weighed.
        exact: what belongs in some columns instead of coded tokens: at most one of a kind, and a run counts last.
        dtype: what rounds levels.
        weighing: how scores become weights.

    Returns:
        Coefficients of values [B,g R,w], and the weight [B,g R] that sinks leave to them.
    """
    batch, length, first = len(keys[0].rows), keys[0].rows.shape[1], keys[0].query
    rows = first.shape[1] * first.shape[2]
    pairs = [_keys_of(each, exact, dtype) for each in keys]
    held = [each for _, _, tensors in pairs for each in tensors]
    side, codec = None, keys[0].codec if values.rows is None else values.codec
    if values.rows is not None:
        side, of_side = _side(codec, values.rows, exact, dtype, values=True)
        held += of_side
    weighed, of_scores = _weighing_of(weighing, side, values.groups, batch, rows)
    held += of_scores
    context, share = first.new_empty(batch, rows, codec.width // values.groups), first.new_empty(batch, rows)
    of_rows, of_keys = _places([own for own, _, _ in pairs]), _places([own for _, own, _ in pairs])
    sizes = (batch, length, _threads(batch * length))
    loaded().anymla_attend(
        of_rows, of_keys, len(pairs), ctypes.byref(weighed), _address(context), _address(share), *sizes
    )
    del held
    return context, share


def _weighing_of(
    weighing: Weighing, values: _Side | None, groups: int, batch: int, rows: int
) -> tuple[_Weighing, list[Tensor | None]]:
    """How C makes weights of the scores of so many ``rows`` of queries, and the tensors that it points to."""
    mask, constant, softcap, sinks = weighing
    new, strides = 1, [0, 0, 0]
    if mask is not None:
        new = mask.shape[2]
        mask = mask.float().expand(batch, rows // new, -1, -1)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = [*mask.stride()[:3]]
    constant = None if constant is None else constant.contiguous()
    sinks = None if sinks is None else sinks.float().repeat_interleave(rows // len(sinks))
    addresses = (None if values is None else ctypes.addressof(values), *map(_address, (constant, mask, sinks)))
    found = _Weighing(*addresses, *strides, new, groups, rows // groups, softcap or 0.0)
    return found, [constant, mask, sinks]


def _keys_of(keys: Keys, exact: Sequence[Places | Run], dtype: torch.dtype) -> tuple[_Side, _Keys, list[Tensor | None]]:
    """How C reads rows of keys, what meets them, and the tensors that both point to."""
    turning, (groups, queries) = keys.turning, keys.query.shape[1:3]
    side, held = _side(keys.codec, keys.rows, exact, dtype, values=keys.second, used=turning.used)
    weight, constant = (None, None) if keys.decoder is None else (part.contiguous() for part in keys.decoder)
    numbers = keys.codec.width if weight is None else len(weight)
    of_mean = None if keys.of_mean is None else keys.of_mean.contiguous()
    every = _every(max(numbers, 2 * turning.wave.shape[1]))
    tensors = [*turning[:3], weight, constant, keys.query.contiguous(), of_mean, every]
    found = _Keys(
        *(_address(each) for each in tensors),
        *(turning.pairs.shape[1], turning.wave.shape[1], groups, queries),
        *(numbers, 0 if weight is None else weight.shape[1]),
    )
    return side, found, [*held, *tensors]


class _Fixed(NamedTuple):
    """What explains all rows of a codec; kept, for a step has no time to make it of a coding."""

    places: Tensor
    bits: Tensor
    grid: Tensor | None  # the levels of a grid
    used: Tensor
    every: Tensor
    sizes: tuple[int, int, int]  # outliers, kind of scale, block


_FIXED: WeakKeyDictionary[Any, _Fixed] = WeakKeyDictionary()


def _fixed(codec: Any) -> _Fixed:
    if (found := _FIXED.get(codec)) is None:
        coding, device = codec.coding, torch.device("cpu")
        layout = code_layout(coding, device)
        _FIXED[codec] = found = _Fixed(
            places=layout.places,
            bits=_bits(coding),
            grid=None if coding.kind == "table" else grid_levels(coding.kind, coding.bits[0][0], device),
            used=not_zero(coding),
            every=_every(codec.width),
            sizes=(coding.outliers, layout.form.scale, layout.form.block),
        )
    return found


def _side(
    codec: Any,
    rows: Tensor,
    exact: Sequence[Places | Run],
    dtype: torch.dtype,
    *,
    values: bool,
    used: Tensor | None = None,
) -> tuple[_Side, list[Tensor]]:
    """How C reads ``rows``, and the tensors that it points to; ``used``: coefficients that may not be zero."""
    fixed = _fixed(codec)
    levels = codec.levels_in(dtype) if fixed.grid is None else fixed.grid
    numbers, places = _exact(exact, len(rows), codec.width, values=values)
    used = fixed.used if used is None else used
    tensors = [rows, fixed.places, fixed.bits, levels, *numbers, used, fixed.every]
    side = _Side(
        *(_address(each) for each in tensors),
        *(*rows.stride(), codec.width, codec.row_bytes),
        *(*fixed.sizes, *places, used.shape[0]),
    )
    return side, tensors


def _exact(
    exact: Sequence[Places | Run], batch: int, width: int, *, values: bool
) -> tuple[list[Tensor], tuple[int, int, int]]:
    """Sequence, column and float32 coefficients of exact tokens, and coefficients of a run of columns.

    And how many are placed, the run's first column, and its length.
    """
    row = column = _NONE
    placed = run = _NO_NUMBERS
    first = length = 0
    for each in exact:
        numbers = (each.values if values else each.keys).float()
        if numbers.shape[-1] != width:
            raise ValueError(f"exact tokens of a coded cache: {numbers.shape[-1]} coefficients, the rows have {width}")
        if isinstance(each, Run):
            run, first, length = numbers.expand(batch, -1, -1).contiguous(), each.first, numbers.shape[1]
        else:
            row, column, placed = each.row.contiguous(), each.column.contiguous(), numbers.contiguous()
    return [row, column, placed, run], (row.shape[0], first, length)


def _bits(coding: Coding) -> Tensor:
    return torch.tensor([bits for bits, count in coding.bits for _ in range(count)], dtype=torch.int32, device="cpu")


@cache
def not_zero(coding: Coding) -> Tensor:
    """The coefficients that a coded token may have, int32."""
    return ((_bits(coding) > 0) | (coding.outliers > 0)).nonzero()[:, 0].int()


def not_zero_turned(coding: Coding, pairs: Tensor) -> Tensor:
    """The same once ``pairs`` [2 or more,n] were turned: both parts of a pair, if one is coded."""
    found = torch.zeros(coding.width, dtype=torch.bool, device=pairs.device)
    found[not_zero(coding).long()] = True
    real, imag = pairs[:2].long()
    found[real] = found[imag] = found[real] | found[imag]
    return found.nonzero()[:, 0].int()


@cache
def _every(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device="cpu")


def _places(structures: Sequence[ctypes.Structure]) -> Any:
    """The addresses of structures, as C takes them."""
    return (ctypes.c_void_p * len(structures))(*(ctypes.addressof(each) for each in structures))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(tokens: int) -> int:
    """How many pay for themselves."""
    return min(torch.get_num_threads(), -(-tokens // TILE))

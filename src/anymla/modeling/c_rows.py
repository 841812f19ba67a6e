"""How C reads rows of codes and makes them, on a CPU; torch is the reference, and does where C does not run.

One of the modelling files that travel with every converted checkpoint; c_kernels.py and c_encoding.py have what runs,
and c_library.py compiles it.

Shapes: B batch, S cached tokens, n coefficients of a token.
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


class Side(ctypes.Structure):
    """Rows of codes, and what explains them, as C has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "places", "bits", "levels")),
        *((name, ctypes.c_void_p) for name in ("exact_row", "exact_column", "exact_numbers", "run", "used", "every")),
        *((name, ctypes.c_int64) for name in ("row_step", "token_step", "byte_step", "width", "row_bytes")),
        *(
            (name, ctypes.c_int64)
            for name in ("outliers", "scale", "block", "exact", "run_first", "run_length", "useds")
        ),
    )


def runs_in_c(query: Tensor, *codecs: Any) -> bool:
    """Whether C reads rows of these codecs for float32 queries: on a CPU, without gradients."""
    plain = any(codec.coding.kind == "plain" for codec in codecs)
    if query.device.type != "cpu" or query.dtype != torch.float32 or plain:
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and library() is not None


def encoded(codec: Any, x: Tensor) -> Tensor:
    """What ``codec`` makes of coefficients [..,n]: by tables in C, where C runs."""
    if codec.coding.kind != "table" or not runs_in_c(x.new_empty(0, dtype=torch.float32), codec):
        made: Tensor = codec.encode(x)
        return made
    numbers = x.reshape(-1, codec.width).float().contiguous()
    rows = torch.zeros(len(numbers), codec.row_bytes, dtype=torch.uint8, device=x.device)
    side, held = side_of(codec, rows[None], (), torch.float32, values=False)
    held += [numbers, steps := codec.steps()]
    places = (address(numbers), address(steps), address(rows), len(rows), threads_for(len(rows)))
    loaded().anymla_encode(ctypes.byref(side), *places)
    del held
    return rows.view(*x.shape[:-1], codec.row_bytes)


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
            every=first_numbers(codec.width),
            sizes=(coding.outliers, layout.form.scale, layout.form.block),
        )
    return found


def side_of(
    codec: Any,
    rows: Tensor,
    exact: Sequence[Places | Run],
    dtype: torch.dtype,
    *,
    values: bool,
    used: Tensor | None = None,
) -> tuple[Side, list[Tensor]]:
    """How C reads ``rows``, and the tensors that it points to; ``used``: coefficients that may not be zero."""
    fixed = _fixed(codec)
    levels = codec.levels_in(dtype) if fixed.grid is None else fixed.grid
    numbers, places = _exact(exact, len(rows), codec.width, values=values)
    used = fixed.used if used is None else used
    tensors = [rows, fixed.places, fixed.bits, levels, *numbers, used, fixed.every]
    side = Side(
        *(address(each) for each in tensors),
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
def first_numbers(count: int) -> Tensor:
    """0, 1, .. in int32, as lists of coefficients are."""
    return torch.arange(count, dtype=torch.int32, device="cpu")


def address(tensor: Tensor | None) -> int | None:
    """Where C finds the numbers of a tensor."""
    return None if tensor is None else tensor.data_ptr()


def threads_for(tokens: int) -> int:
    """How many pay for themselves."""
    return min(torch.get_num_threads(), -(-tokens // TILE))

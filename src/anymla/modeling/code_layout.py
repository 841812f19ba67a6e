"""Where in a row of bytes each coefficient's code lies: what a kernel that reads single coefficients needs.

One of the modelling files that travel with every converted checkpoint; it needs torch only. The rows are those of
codecs.py. A code of 1 to 8 bits lies in at most two pieces, each within one byte, for planes hold 8, 4, 2 or 1 bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .codec_tables import planes_of
from .coding_spec import INDEX_BYTES, PAIRED, SCALE_BYTES, Coding

NO_LEVELS = -1  # instead of the place of levels
SHIFT, LEFT, MASK = 16, 19, 23  # first bits of the fields of a piece, after its byte's place
NO_SCALE, GRID_SCALE, TOKEN_SCALE = range(3)
Piece = tuple[int, int, int, int]  # byte, bits below it in the byte, bits below it in the code, mask


class CodeForm(NamedTuple):
    """What a kernel must know of rows when it is compiled."""

    coded: bool = False  # rows are bytes; else the numbers themselves
    two: bool = False  # some code has two pieces
    halves: bool = False  # some coefficient is a float16
    scale: int = NO_SCALE
    block: int = 1  # coefficients that share a scale
    outliers: int = 0


class CodeLayout(NamedTuple):
    """The form of rows, and for each of n coefficients (int32 [3,n]) both pieces of its code, and where its levels are.

    A float16 has no levels; its pieces are its two bytes. What has no bits has no levels and no pieces.
    """

    form: CodeForm
    places: Tensor


@cache
def code_layout(coding: Coding, device: torch.device) -> CodeLayout:
    """The layout of rows of this coding, which are not "plain"."""
    scales = {"table": 2 * coding.token_scale}.get(coding.kind, -(-coding.width // (coding.block or coding.width)))
    first = (SCALE_BYTES + INDEX_BYTES) * coding.outliers + SCALE_BYTES * scales
    halves = coding.counts.get(16, 0)
    classes = {bits: count for bits, count in coding.counts.items() if 0 < bits < 16}
    of_class = _table_pieces(classes, first + 2 * halves) if coding.kind == "table" else _grid_pieces(classes, first)
    of_class[16] = [[(first + 2 * place, 0, 0, 255), (first + 2 * place + 1, 0, 8, 255)] for place in range(halves)]
    starts, levels = {}, 0
    for bits, count in classes.items():
        starts[bits], levels = levels, levels + 2**bits * count
    rows, used = [], dict.fromkeys((*of_class, 0), 0)
    for bits, count in coding.bits:
        for place in range(used[bits], used[bits] + count):
            pieces = of_class[bits][place] if bits else []
            start = starts[bits] + place * 2**bits if bits in starts else NO_LEVELS
            rows.append((*(_number(piece) for piece in [*pieces, *[None] * (2 - len(pieces))]), start))
        used[bits] += count
    form = CodeForm(
        coded=True,
        two=any(second for _, second, _ in rows),
        halves=halves > 0,
        scale=GRID_SCALE if coding.kind != "table" else TOKEN_SCALE if coding.token_scale else NO_SCALE,
        block=coding.block or coding.width,
        outliers=coding.outliers,
    )
    places = torch.tensor(rows, dtype=torch.int32, device=device).T.contiguous()
    if form.scale == GRID_SCALE:  # one grid for all
        places[2] = 0
    return CodeLayout(form, places)


@cache
def grid_levels(kind: str, bits: int, device: torch.device) -> Tensor:
    """What the codes of a grid mean, before the scale."""
    codes = torch.arange(2**bits, dtype=torch.uint8)
    found = codes.view(torch.float8_e4m3fn).float() if kind == "fp8" else codes.float() - 2 ** (bits - 1)
    return found.to(device)


def _number(piece: Piece | None) -> int:
    """A piece as one integer of 31 bits; 0 for none."""
    if piece is None:
        return 0
    byte, below, left, mask = piece
    return byte | below << SHIFT | left << LEFT | mask << MASK


def _grid_pieces(classes: dict[int, int], first: int) -> dict[int, list[list[Piece]]]:
    """Codes of one width that follow each other."""
    return {
        bits: [[(first + place * bits // 8, place * bits % 8, 0, 2**bits - 1)] for place in range(count)]
        for bits, count in classes.items()
    }


def _table_pieces(classes: dict[int, int], first: int) -> dict[int, list[list[Piece]]]:
    """Codes whose words are cut into planes."""
    cuts: dict[int, list[tuple[int, int, int, int]]] = {bits: [] for bits in classes}
    for plane, size, held in planes_of(classes):
        word = 0
        for bits, below, count in held:
            cuts[bits].append((first, plane, below, word))
            word += count
        first += size
    return {bits: [_pieces(bits, place, cuts[bits]) for place in range(count)] for bits, count in classes.items()}


def _pieces(bits: int, place: int, cuts: list[tuple[int, int, int, int]]) -> list[Piece]:
    """Those of coefficient ``place`` of its class; ``cuts``: plane's begin, its bits, those below, first word."""
    word, second = (place // 2, place % 2) if bits <= PAIRED else (place, 0)
    low, pieces = second * bits, []
    for begin, plane, below, first in cuts:
        start, stop = max(below, low), min(below + plane, low + bits)
        if start < stop:
            bit = (first + word) * plane
            pieces.append((begin + bit // 8, bit % 8 + start - below, start - low, 2 ** (stop - start) - 1))
    return pieces

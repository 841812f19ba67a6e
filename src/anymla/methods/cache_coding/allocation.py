"""Bits of every coefficient: least error at a budget of bytes. Loads no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise

from anymla.modeling.coding_spec import WIDTHS, Coding

# Squared error that a quantiser of so many bits leaves of a coefficient of variance 1: Lloyd-Max levels of a Gaussian
# (Max, 1960, table I), and a float16.
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000642, 8: 4.1e-5, 16: 4e-8}

FALL = 1e-4  # of the energies of a layer that nobody looked at, from its first coefficient to its last
TRIES = 16  # prefixes of steps that are tried beyond the one that bisection finds
MISSES = 500  # steps in a row that do not fit, after which no smaller one is looked for


def allocate(rows: Sequence[Sequence[float]], budget: int, held: Sequence[int] | None = None) -> list[list[int]]:
    """Bits from WIDTHS for every coefficient of every row, such that all rows take at most ``budget`` bytes.

    Where rows had no padding this is the optimum over the convex hull of DISTORTION: whoever gains most per bit is
    served first. Then single steps that still fit use up what is left and the padding. Every row gets a byte at least:
    a cache must see that it holds a token.

    Args:
        rows: what each coefficient costs where it is left out; its error at b bits is DISTORTION[b] times that.
        budget: bytes of all rows, at least those of one byte in each.
        held: tokens that each row is stored for. Default: one.
    """
    hull, held = _hull(), held or [1] * len(rows)
    first = [
        (row, max(range(len(energies)), key=energies.__getitem__), hull[1])
        for row, energies in enumerate(rows)
        if energies  # a family without rope has no rope key
    ]
    steps = first + [
        step
        for _, step in sorted(
            (-energy * _gain(low, high) / held[row], (row, place, high))
            for row, energies in enumerate(rows)
            for place, energy in enumerate(energies)
            if energy > 0
            for low, high in pairwise(hull)
        )
    ]
    fits = _most_steps(rows, steps, budget, len(first), held)
    bits = _taken(rows, steps[:fits])
    sizes = [tokens * code_bytes(row) for tokens, row in zip(held, bits, strict=True)]
    budget, misses = budget - sum(sizes), 0
    for row, place, high in steps[fits:]:
        if bits[row][place] != hull[hull.index(high) - 1]:  # its step before did not fit
            continue
        changed = [*bits[row][:place], high, *bits[row][place + 1 :]]
        if (more := held[row] * code_bytes(changed) - sizes[row]) <= budget:
            misses, budget, bits[row], sizes[row] = 0, budget - more, changed, sizes[row] + more
        elif (misses := misses + 1) > MISSES:
            break
    return bits


def price(rows: Sequence[Sequence[float]], budget: int, held: Sequence[int]) -> float:
    """What the last bit, of one token, of ``budget`` bytes gains, were nothing padded; 0 where all bits fit."""
    gains = sorted(
        (
            (energy * _gain(low, high) / tokens, (high - low) * tokens)
            for row, tokens in zip(rows, held, strict=True)
            for energy in row
            for low, high in pairwise(_hull())
        ),
        reverse=True,
    )
    left = 8 * budget
    for gain, more in gains:
        if (left := left - more) < 0:
            return gain
    return 0.0


def at_price(energy: float, price: float) -> tuple[int, float]:
    """Bits of a coefficient where each bit costs ``price``; and its error together with what they cost."""
    hull = _hull()
    bits = next((low for low, high in pairwise(hull) if energy * _gain(low, high) <= price), hull[-1])
    return bits, energy * DISTORTION[bits] + price * bits


def error(energies: Sequence[float], bits: Sequence[int]) -> float:
    """What a row's coefficients lose at ``bits``."""
    return sum(energy * DISTORTION[each] for energy, each in zip(energies, bits, strict=True))


def typical(width: int) -> list[float]:
    """Energies of so many coefficients of a layer that nobody looked at: evenly falling ones."""
    return [FALL ** (place / width) for place in range(width)]


def coding(bits: Sequence[int], order: Sequence[int]) -> Coding:
    """How a row is stored whose coefficients have these ``bits``; ``order``: their places as they are stored."""
    if not bits:  # the rope key of a family without rope
        return Coding(bits=((16, 0),), kind="plain")
    return Coding(bits=tuple((width, len(list(run))) for width, run in groupby(bits[place] for place in order)))


def code_bytes(bits: Sequence[int]) -> int:
    """Bytes of a row whose coefficients have so many bits."""
    return Coding(bits=tuple(Counter(bits).items())).row_bytes


def _most_steps(
    rows: Sequence[Sequence[float]],
    steps: Sequence[tuple[int, int, int]],
    budget: int,
    least: int,
    held: Sequence[int],
) -> int:
    """How many of ``steps`` fit, at least ``least``: found by bisection, and among those whose bits alone would fit.

    Bytes do not always rise with the steps: a row in which two coefficients have the same bits has less padding.
    """

    def bits_only(count: int) -> int:
        return -(-sum(tokens * sum(row) for tokens, row in zip(held, _taken(rows, steps[:count]), strict=True)) // 8)

    def in_bytes(count: int) -> int:
        return sum(tokens * code_bytes(row) for tokens, row in zip(held, _taken(rows, steps[:count]), strict=True))

    counts = range(len(steps) + 1)
    found = bisect_right(counts, budget, lo=least, key=in_bytes) - 1
    most = bisect_right(counts, budget, lo=found, key=bits_only) - 1
    return next((count for count in range(most, max(found, most - TRIES), -1) if in_bytes(count) <= budget), found)


def _taken(rows: Sequence[Sequence[float]], steps: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """The bits of all rows after ``steps``: row, place and the bits that the coefficient there then has."""
    bits = [[0] * len(energies) for energies in rows]
    for row, place, high in steps:
        bits[row][place] = max(bits[row][place], high)
    return bits


@cache
def _hull() -> list[int]:
    """The widths from which each next one gains less per bit than the one before."""
    hull: list[int] = []
    for width in WIDTHS:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], width):
            hull.pop()
        hull.append(width)
    return hull


@cache
def _gain(low: int, high: int) -> float:
    return (DISTORTION[low] - DISTORTION[high]) / (high - low)

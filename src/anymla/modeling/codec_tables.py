"""The codec of tables: each coefficient has levels of its own, non-uniform and static.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codec import FLOAT16_MAX, FLOAT16_TINY, Codec, Kept, decode_half, encode_half, joined, pack, unpack
from .coding_spec import PAIRED, PLANES, Coding, word
from .room import Room

IN_CACHE = 2**17  # numbers that are encoded at once: what is made of them stays in a CPU's cache
HIGH = -(1 << 16)  # the bits of a float32 that a bfloat16 has


class _Writing(NamedTuple):
    """What encoding needs: n coefficients of 1 to 8 bits by falling bits, m of all."""

    bounds: Tensor  # flat, of [n, most levels - 1]: halfway between levels, then infinite
    first: Tensor  # [n], where a coefficient's bounds start
    levels: Tensor  # flat
    starts: Tensor  # [n], where a coefficient's levels start
    steps: Tensor  # [m], mean distance of two levels; where there are none the mean of the others'
    order: Tensor | None  # [m], the coefficients by falling bits, unless they are so by themselves


class _Reading(NamedTuple):
    """What decoding needs."""

    levels: list[list[Tensor]]  # of each source, flat, of every word's values: of its first code, of its second one
    starts: Tensor  # [words,1], int32, where a word's levels start
    places: Tensor  # [width], the row of each coefficient among all that are read


class TableCodec(Codec):
    """Non-uniform levels (NUQ), dense and sparse: KVQuant, arXiv 2401.18079, sections 3.3 and 3.4.

    ``levels``: of all coefficients of 1 to 8 bits, by falling bits, one coefficient after the other. 16 bits are a
    float16 within its range. Outliers are the coefficients farthest from their level, in steps of their own table;
    with ``token_scale`` the largest and the smallest of a token, as many of each, before the scale is taken.
    """

    levels: Tensor

    def __init__(self, coding: Coding) -> None:
        super().__init__(coding)
        self.register_buffer("levels", torch.zeros(coding.table_numbers, dtype=torch.float32))
        widths = [bits for bits, count in coding.bits for _ in range(count)]
        order = sorted(range(len(widths)), key=lambda place: -widths[place])
        self._order = None if order == sorted(order) else order
        self._halves = coding.counts.get(16, 0)
        self._classes = {bits: count for bits, count in coding.counts.items() if 0 < bits < 16}
        self._coded = sum(self._classes.values())
        self._planes = planes_of(self._classes)
        self._words = {bits: word(bits, count)[1] for bits, count in self._classes.items()}
        singles, pairs = ([bits for bits in self._words if (bits <= PAIRED) == paired] for paired in (False, True))
        self._sources = [widths for widths in (singles, pairs) if widths]
        self._parts, self._places = self._placed()
        self._kept = Kept()

    def set_tables(self, tables: Mapping[int, Tensor]) -> None:
        """Takes over levels.

        Args:
            tables: by bits, [coefficients of so many bits, 2**bits], in the coefficients' order, each row sorted.

        Raises:
            ValueError: a table is missing, is not of that shape, not sorted, or not finite.
        """
        needed = {bits: (count, 2**bits) for bits, count in self._classes.items()}
        if (found := {bits: tuple(table.shape) for bits, table in tables.items()}) != needed:
            raise ValueError(f"levels of a coded cache: the tables must have shapes {needed}, got {found}")
        flat = [tables[bits].flatten() for bits in self._classes]
        self.levels = torch.cat(flat).to(self.levels) if flat else self.levels
        self._kept.get(self.levels, self._writing)

    def levels_in(self, dtype: torch.dtype) -> Tensor:
        """The levels in float32, as ``dtype`` rounds them, and eight zeros after them: C reads eight at once.

        Raises:
            ValueError: they are damaged.
        """
        return self._kept.get(self.levels, self._rounded, dtype)

    def steps(self) -> Tensor:
        """The mean distance of each coefficient's levels, by which errors count; the mean of all where it has none."""
        return self._kept.get(self.levels, self._steps)

    def _steps(self) -> Tensor:
        tables = self._kept.get(self.levels, self._writing)
        return tables.steps if tables.order is None else tables.steps[tables.order.argsort()].contiguous()

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        flat = [each.flatten() for each in self._tables().values()]
        return joined([*flat, self.levels.new_zeros(8)]).to(dtype).float()

    def encode(self, x: Tensor) -> Tensor:
        """The rows, uint8 [..., row_bytes], of coefficients [..., width]."""
        tables = self._kept.get(self.levels, self._writing)
        tokens = x.reshape(-1, self.width).float()
        parts = [self._encode(part, tables) for part in tokens.split(max(1, IN_CACHE // self.width))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], self.row_bytes)

    def _encode(self, x: Tensor, tables: _Writing) -> Tensor:
        """The rows [N, row_bytes] of coefficients [N, width]."""
        ordered = x if tables.order is None else x[:, tables.order]
        dense = ordered[:, self._halves : self._halves + self._coded]
        numbers, places = [], x.new_zeros(0)
        if self.coding.token_scale:
            places, zero, scale = self._token_scale(x)
            numbers, dense = [zero, scale], (dense - zero) / scale
        codes = _search(dense, tables.bounds, tables.first)
        if self.coding.outliers:
            places = places if numbers else self._outliers(ordered, codes, tables)
            numbers.append(x.gather(-1, places))
        parts = self._pack(codes)
        if numbers or self._halves:
            parts.insert(0, encode_half(joined([*numbers, ordered[:, : self._halves]])))
        if self.coding.outliers:
            parts.insert(0, places.to(torch.int16).view(torch.uint8))
        return joined(parts) if parts else x.new_empty(len(x), 0, dtype=torch.uint8)

    def _read(self, columns: Tensor, x: Tensor, dtype: torch.dtype, room: Room) -> None:
        rounds = dtype if dtype.itemsize < 4 else torch.float32
        coding, tables = self.coding, self._kept.get(self.levels, self._reading, rounds)
        sparse, scales = coding.outliers, 2 * coding.token_scale
        start = 2 * (2 * sparse + scales + self._halves)
        numbers = room.empty("numbers", (sum(self._parts), columns.shape[1]), torch.float32, x.device)
        parts = [part.view(-1) for part in numbers.split_with_sizes(self._parts)]
        found = self._look_ups(columns[start:], tables.starts, room)
        for index, levels, part in zip(found, tables.levels, parts[:-1], strict=True):
            _look_up(levels, index, part.unflatten(0, (-1, len(index))), room)
        others, halves = numbers[len(numbers) - self._parts[-1] :].zero_(), None
        if start:
            halves = decode_half(columns[:start])
            others[: self._halves] = halves[2 * sparse + scales :]
        if halves is not None and scales:
            numbers[: len(numbers) - len(others)].mul_(halves[sparse + 1]).add_(halves[sparse])
        for read, part in zip(numbers.view(len(numbers), len(x), -1).unbind(1), x, strict=True):
            torch.index_select(read, 0, tables.places, out=part)
        if halves is not None and sparse:
            halves = halves.view(len(halves), len(x), -1).transpose(0, 1)
            places = halves[:, :sparse].contiguous().view(torch.int16).long() & 0xFFFF
            x.scatter_(1, places, halves[:, sparse + scales :][:, :sparse].float())

    def _look_ups(self, packed: Tensor, starts: Tensor, room: Room) -> list[Tensor]:
        """Of each source, where in its levels the words [W N] lie."""
        shape, counts = (len(starts), packed.shape[1]), [*self._words.values()]
        words = room.empty("words", shape, torch.uint8, packed.device)
        of_class = dict(zip(self._words, words.split_with_sizes(counts), strict=True))
        begun = set()
        for plane, size, held in self._planes:
            parts = unpack(packed[:size], plane, room)
            for bits, below, count in held:
                part, parts = parts[:count], parts[count:]
                if bits in begun:
                    of_class[bits].add_(part, alpha=2**below)
                else:
                    torch.bitwise_left_shift(part, below, out=of_class[bits])
                begun.add(bits)
            packed = packed[size:]
        index = torch.add(words, starts, out=room.empty("index", shape, torch.int32, packed.device))
        sizes = [sum(self._words[bits] for bits in widths) for widths in self._sources]
        return [part.view(-1) for part in index.split_with_sizes(sizes)]

    def _token_scale(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outliers' places, zero point and scale [N,1] of tokens: the rest of a token lies within -1 and 1."""
        smallest = self.coding.outliers // 2
        high, high_places = x.topk(self.coding.outliers - smallest + 1)
        low, low_places = x.topk(smallest + 1, largest=False)
        high, low = high[:, -1:], low[:, -1:]
        zero = ((high + low) / 2).clamp(-FLOAT16_MAX, FLOAT16_MAX)
        scale = ((high - low) / 2).clamp(FLOAT16_TINY, FLOAT16_MAX)
        places = torch.cat([high_places[:, :-1], low_places[:, :-1]], -1)
        return places, zero.half().float(), scale.half().float()

    def _outliers(self, ordered: Tensor, codes: Tensor, tables: _Writing) -> Tensor:
        """Places [N, outliers] of the coefficients that are farthest from what their code says."""
        error, stop = ordered.clone(), self._halves + self._coded
        error[:, : self._halves] = 0
        error[:, self._halves : stop] -= tables.levels.take(codes + tables.starts)
        places = (error.abs() / tables.steps).topk(self.coding.outliers).indices
        return places if tables.order is None else tables.order[places]

    def _pack(self, codes: Tensor) -> list[Tensor]:
        """The planes of codes [N, n]."""
        words = {}
        parts = codes.split([*self._classes.values()], -1)
        for (bits, count), part in zip(self._classes.items(), parts, strict=True):
            if bits <= PAIRED:
                part = pad(part, (0, 1)) if count % 2 else part
                part = torch.add(part[:, ::2], part[:, 1::2], alpha=2**bits)
            words[bits] = part
        planes = []
        for plane, _, held in self._planes:
            cut = [words[bits] >> below & 2**plane - 1 if plane < 8 else words[bits] for bits, below, _ in held]
            planes.append(pack(joined(cut), plane))
        return planes

    def _placed(self) -> tuple[list[int], list[int]]:
        """Rows of numbers that are read: how many of each source and side, and which of them a coefficient is."""
        parts: list[int] = []
        of_class: dict[int, Iterator[int]] = {}
        for widths in self._sources:
            first, size = sum(parts), sum(self._words[bits] for bits in widths)
            sides = [0, size] if widths[0] <= PAIRED else [0]
            for bits in widths:
                of_class[bits] = iter([first + at + side for at in range(self._words[bits]) for side in sides])
                first += self._words[bits]
            parts.append(size * len(sides))
        zero = sum(parts) + self._halves
        of_class[16], of_class[0] = iter(range(sum(parts), zero)), repeat(zero)
        places = [next(of_class[bits]) for bits, count in self.coding.bits for _ in range(count)]
        return [*parts, self._halves + (0 in self.coding.counts)], places

    def _tables(self) -> dict[int, Tensor]:
        """The levels by bits, [coefficients, 2**bits].

        Raises:
            ValueError: they are damaged.
        """
        parts = self.levels.float().split([2**bits * count for bits, count in self._classes.items()])
        tables = {bits: part.view(-1, 2**bits) for bits, part in zip(self._classes, parts, strict=True)}
        for bits, table in tables.items():
            if not table.isfinite().all() or (table.diff() < 0).any():
                raise ValueError(f"levels of a coded cache, {bits} bits: not finite or not sorted, the file is damaged")
        return tables

    def _writing(self) -> _Writing:
        tables, device = self._tables(), self.levels.device
        most = max((2**bits for bits in tables), default=1)
        halfway = [(each[:, 1:] + each[:, :-1]) / 2 for each in tables.values()]
        bounds = [pad(each, (0, most - 1 - each.shape[1]), value=torch.inf).flatten() for each in halfway]
        step = [(each[:, -1] - each[:, 0]) / (each.shape[1] - 1) for each in tables.values()]
        mean = float(torch.cat(step).mean()) if step else 1.0
        steps = torch.full((self.width,), mean, dtype=torch.float32, device=device)
        steps[self._halves : self._halves + self._coded] = torch.cat([steps[:0], *step])
        sizes = torch.tensor([2**bits for bits, count in self._classes.items() for _ in range(count)], dtype=torch.long)
        order = None if self._order is None else torch.tensor(self._order, device=device)
        return _Writing(
            bounds=torch.cat([steps[:0], *bounds]),
            first=torch.arange(self._coded, dtype=torch.int32, device=device) * (most - 1),
            levels=self.levels.float(),
            starts=(sizes.cumsum(0) - sizes).to(device),
            steps=steps.clamp(min=FLOAT16_TINY),
            order=order,
        )

    def _reading(self, dtype: torch.dtype) -> _Reading:
        tables, levels, starts = self._tables(), [], [self.levels.new_zeros(0, 1, dtype=torch.long)]
        for widths in self._sources:
            sides = [_sides(tables[bits].to(dtype), bits) for bits in widths]
            sizes = torch.tensor([each.shape[1] for each, *_ in sides for _ in each], device=self.levels.device)
            starts.append((sizes.cumsum(0) - sizes)[:, None])
            flat = [torch.cat([each.flatten() for each in side]) for side in zip(*sides, strict=True)]
            if dtype == torch.bfloat16 and len(flat) == 2:
                levels.append([torch.stack(flat[::-1], -1).view(torch.int32)[:, 0]])
            else:
                levels.append([each.float() for each in flat])
        return _Reading(levels, torch.cat(starts).int(), torch.tensor(self._places, device=self.levels.device))


def _search(x: Tensor, bounds: Tensor, first: Tensor) -> Tensor:
    """How many bounds of its own each number of x [N, n] exceeds, uint8: halvings of all numbers at once.

    ``bounds``: flat, as many of each coefficient: 2**b - 1; ``first`` [n]: where those of a coefficient start.
    """
    place, flat = first.repeat(len(x)), x.flatten()
    step = (len(bounds) // max(1, len(first)) + 1) // 2
    while step:
        place.add_(flat > bounds[step - 1 :].index_select(0, place), alpha=step)
        step //= 2
    return (place.view(x.shape) - first).to(torch.uint8)


def _sides(table: Tensor, bits: int) -> list[Tensor]:
    """Levels [n,L]; of pairs those of the first and of the second of every two codes, [n/2,L L] each."""
    if bits > PAIRED:
        return [table]
    table = pad(table, (0, 0, 0, len(table) % 2))
    size = table.shape[1]
    return [table[::2].repeat(1, size), table[1::2].repeat_interleave(size, 1)]


def _look_up(levels: list[Tensor], index: Tensor, found: Tensor, room: Room) -> None:
    """Puts what is in ``levels`` at ``index`` [W N] into ``found`` [sides,W N].

    Two bfloat16 are one integer, so that one look-up reads both: each is the upper half of a float32.
    """
    if levels[0].dtype == torch.int32:
        both = torch.index_select(levels[0], 0, index, out=room.empty("pairs", index.shape, torch.int32, index.device))
        torch.bitwise_and(both, HIGH, out=found[0].view(torch.int32))
        torch.bitwise_left_shift(both, 16, out=found[1].view(torch.int32))
        return
    for table, part in zip(levels, found, strict=True):
        torch.index_select(table, 0, index, out=part)


def planes_of(classes: Mapping[int, int]) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Planes of a row: their bits, bytes, and whose words' parts they hold: (class, bits of the word below, words)."""
    words = {bits: word(bits, count) for bits, count in classes.items()}
    planes = []
    for plane in PLANES[1:]:
        held = [(bits, width & plane - 1, count) for bits, (width, count) in words.items() if width & plane]
        if held:
            planes.append((plane, -(-plane * sum(count for _, _, count in held) // 8), held))
    return planes

"""The codec of tables: each coefficient has levels of its own, non-uniform and static.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codec import FLOAT16_MAX, FLOAT16_TINY, Codec, decode_half, encode_half, joined, pack, unpack
from .coding_spec import PAIRED, PLANES, Coding, word

Made = TypeVar("Made")
IN_CACHE = 2**17  # numbers that are encoded at once: what is made of them stays in a CPU's cache
HALVES, SINGLES, PAIRS, ZEROS = range(4)  # where a coefficient is read from: 16 bits, up to 8, up to 4, none


class _Writing(NamedTuple):
    """What encoding needs: n coefficients of 1 to 8 bits by falling bits, m of all."""

    bounds: Tensor  # flat, of [n, most levels - 1]: halfway between levels, then infinite
    first: Tensor  # [n], where a coefficient's bounds start
    levels: Tensor  # flat
    starts: Tensor  # [n], where a coefficient's levels start
    steps: Tensor  # [m], mean distance of two levels; where there are none the mean of the others'
    order: Tensor | None  # [m], the coefficients by falling bits, unless they are so by themselves


class _Reading(NamedTuple):
    """What decoding needs of words of one code or of two: the numbers of every word's values, flat."""

    numbers: Tensor  # both numbers of a pair are one element, so that one look-up reads them
    starts: Tensor  # [words]


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
        self._halves, self._zeros = (coding.counts.get(bits, 0) for bits in (16, 0))
        self._classes = {bits: count for bits, count in coding.counts.items() if 0 < bits < 16}
        self._coded = sum(self._classes.values())
        self._planes = planes_of(self._classes)
        found = {_source(bits) for bits in self._classes}
        self._sources = {each: [bits for bits in self._classes if _source(bits) == each] for each in sorted(found)}
        self._pieces = _pieces(coding)
        self._kept: dict[Any, Any] = {}
        self._kept_of: tuple[Tensor, int] | None = None

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
        self._made(self._writing)

    def encode(self, x: Tensor) -> Tensor:
        """The rows, uint8 [..., row_bytes], of coefficients [..., width]."""
        tables = self._made(self._writing)
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

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The coefficients [..., width] that the rows hold."""
        if dtype.itemsize > 4:
            return self.decode(rows, torch.float32).to(dtype)
        coding, parts = self.coding, {}
        sparse, scales = coding.outliers, 2 * coding.token_scale
        start = 2 * (2 * sparse + scales + self._halves)
        for source, words in self._unpack(rows[..., start:]).items():
            tables = self._made(self._reading, source, dtype)
            found = tables.numbers.index_select(0, (words + tables.starts).flatten())
            parts[source] = found.view(words.shape).view(dtype)
        if start:
            stored = decode_half(rows[..., :start])
            places, numbers = stored[..., :sparse], stored[..., sparse:].to(dtype)
            if scales:
                zero, scale = numbers[..., :1], numbers[..., 1:2]
                parts = {source: part.mul_(scale).add_(zero) for source, part in parts.items()}
            parts[HALVES] = numbers[..., scales + sparse :]
        if self._zeros:
            parts[ZEROS] = torch.zeros(*rows.shape[:-1], self._zeros, dtype=dtype, device=rows.device)
        x = joined([parts[source][..., first:stop] for source, first, stop in self._pieces])
        if sparse:
            x.scatter_(-1, places.view(torch.int16).long() & 0xFFFF, numbers[..., scales : scales + sparse])
        return x

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

    def _unpack(self, packed: Tensor) -> dict[int, Tensor]:
        """The words [..., W] that lie in the planes: of one code, of two."""
        words: dict[int, Tensor] = {}
        for plane, size, held in self._planes:
            counts = [count for _, _, count in held]
            parts = unpack(packed[..., :size], plane)[..., : sum(counts)].split(counts, -1)
            for (bits, _, _), part in zip(held, parts, strict=True):
                words[bits] = torch.add(part, words[bits], alpha=2**plane) if bits in words else part
            packed = packed[..., size:]
        return {source: joined([words[bits] for bits in widths]) for source, widths in self._sources.items()}

    def _made(self, make: Callable[..., Made], *settings: Any) -> Made:
        """``make(*settings)``, kept until the levels change."""
        version = 0 if self.levels.is_inference() else self.levels._version
        if self._kept_of is None or self._kept_of[0] is not self.levels or self._kept_of[1] != version:
            self._kept, self._kept_of = {}, (self.levels, version)
        key = (make.__name__, *settings)
        if key not in self._kept:
            self._kept[key] = make(*settings)
        return self._kept[key]

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
        steps = torch.full((self.width,), float(torch.cat(step).mean()) if step else 1.0, device=device)
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

    def _reading(self, source: int, dtype: torch.dtype) -> _Reading:
        tables = {bits: self._tables()[bits].to(dtype) for bits in self._sources[source]}
        if source == PAIRS:
            tables = {bits: _pairs(each) for bits, each in tables.items()}
        sizes = torch.tensor([each[0].numel() for each in tables.values() for _ in each], dtype=torch.long)
        starts = (sizes.cumsum(0) - sizes).int().to(self.levels.device)
        numbers = torch.cat([each.flatten() for each in tables.values()])
        if source == PAIRS:
            starts, numbers = starts // 2, numbers.view({2: torch.int32, 4: torch.int64}[dtype.itemsize])
        return _Reading(numbers, starts)


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


def _pairs(table: Tensor) -> Tensor:
    """Levels [n, L] as both levels of every two codes, [n / 2, L, L, 2]: the first one's code is the last index."""
    table = pad(table, (0, 0, 0, len(table) % 2))
    size = table.shape[1]
    first, second = table[::2, None, :], table[1::2, :, None]
    return torch.stack([first.expand(-1, size, -1), second.expand(-1, -1, size)], -1)


def _source(bits: int) -> int:
    return HALVES if bits == 16 else SINGLES if bits > PAIRED else PAIRS if bits else ZEROS


def planes_of(classes: Mapping[int, int]) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Planes of a row: their bits, bytes, and whose words' parts they hold: (class, bits of the word below, words)."""
    words = {bits: word(bits, count) for bits, count in classes.items()}
    planes = []
    for plane in PLANES[1:]:
        held = [(bits, width & plane - 1, count) for bits, (width, count) in words.items() if width & plane]
        if held:
            planes.append((plane, -(-plane * sum(count for _, _, count in held) // 8), held))
    return planes


def _pieces(coding: Coding) -> list[tuple[int, int, int]]:
    """Slices (source, first, stop) that make up a token's coefficients in their order."""
    ends, first = dict.fromkeys(range(4), 0), {}
    for bits, count in coding.counts.items():
        source = _source(bits)
        first[bits] = ends[source]
        ends[source] += count + (count % 2 if source == PAIRS else 0)
    pieces: list[tuple[int, int, int]] = []
    for bits, count in coding.bits:
        source, start = _source(bits), first[bits]
        first[bits] = stop = start + count
        if pieces and pieces[-1][0] == source and pieces[-1][2] == start:
            start = pieces.pop()[1]
        pieces.append((source, start, stop))
    return pieces

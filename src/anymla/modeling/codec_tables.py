"""The codec of tables: each coefficient has levels of its own, non-uniform and static.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import FLOAT16_MAX, FLOAT16_TINY, Codec, decode_half, encode_half, pack, unpack
from .coding_spec import PLANES, Coding


class _Tables(NamedTuple):
    """What coding needs of the levels, n coefficients of 1 to 8 bits by falling bits, m of all."""

    source: Tensor  # the buffer, and how often it was written to: is this still of it?
    version: int
    levels: Tensor  # flat, [sum of 2**bits]
    starts: Tensor  # [n], where a coefficient's levels start
    bounds: Tensor  # [n, most levels - 1], halfway between levels, then infinite
    steps: Tensor  # [m], mean distance of two levels; of a coefficient without levels the mean of the others'
    order: Tensor | None  # [m], the coefficients by falling bits, where they are not so by themselves
    back: Tensor | None


class TableCodec(Codec):
    """NUQ, static non-uniform levels per coefficient; dense-and-sparse (KVQuant, arXiv 2401.18079, sections 3.3, 3.4).

    ``levels``: of all coefficients of 1 to 8 bits, in their order, one after the other. 16 bits are a float16.
    With ``token_scale`` outliers are the largest and the smallest coefficients of a token, as many of each (KVQuant's
    values); without they are those farthest from their level, in steps of their table.
    """

    levels: Tensor

    def __init__(self, coding: Coding) -> None:
        super().__init__(coding)
        self.register_buffer("levels", torch.zeros(coding.table_numbers, dtype=torch.float32))
        widths = [bits for bits, count in coding.bits for _ in range(count)]
        order = sorted(range(len(widths)), key=lambda place: -widths[place])
        self._order = None if order == sorted(order) else order
        self._classes = tuple((bits, widths.count(bits)) for bits in sorted({*widths} - {0, 16}, reverse=True))
        self._halves = widths.count(16)
        self._coded = sum(count for _, count in self._classes)
        self._widths = widths
        self._prepared: _Tables | None = None

    def set_tables(self, tables: Mapping[int, Tensor]) -> None:
        """Takes over levels.

        Args:
            tables: by bits, [coefficients of so many bits, 2**bits], in the coefficients' order, each row sorted.

        Raises:
            ValueError: a table is missing, is not of that shape, not sorted, or not finite.
        """
        needed = {bits: (count, 2**bits) for bits, count in self._classes}
        if (found := {bits: tuple(table.shape) for bits, table in tables.items()}) != needed:
            raise ValueError(f"levels of a coded cache: the tables must have shapes {needed}, got {found}")
        rows = {bits: iter(table) for bits, table in tables.items()}
        flat = [next(rows[bits]) for bits in self._widths if 0 < bits < 16]
        self.levels = torch.cat(flat).to(self.levels) if flat else self.levels
        self._tables()

    def encode(self, x: Tensor) -> Tensor:
        """The rows, uint8 [..., row_bytes], of coefficients [..., width]."""
        tables, shape = self._tables(), x.shape[:-1]
        x = x.reshape(-1, self.width).float()
        ordered = x if tables.order is None else x[:, tables.order]
        dense = ordered[:, self._halves : self._halves + self._coded]
        numbers, outliers = [], None
        if self.coding.token_scale:
            outliers, zero, scale = self._token_scale(x)
            dense = (dense - zero) / scale
            numbers = [zero, scale]
        codes = torch.searchsorted(tables.bounds, dense.mT.contiguous()).mT
        if self.coding.outliers and outliers is None:
            outliers = self._outliers(ordered, codes, tables)
        if outliers is not None:
            numbers.append(x.gather(-1, outliers))
        halves = encode_half(torch.cat([*numbers, ordered[:, : self._halves]], -1))
        places = [] if outliers is None else [outliers.to(torch.int16).view(torch.uint8)]
        return torch.cat([*places, halves, *self._pack(codes.to(torch.uint8))], -1).unflatten(0, shape)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The coefficients [..., width] that the rows hold."""
        tables, coding = self._tables(), self.coding
        sparse, scales = coding.outliers, 2 * coding.token_scale
        start = 2 * (2 * sparse + scales + self._halves)
        halves = decode_half(rows[..., 2 * sparse : start]).to(dtype)
        dense = tables.levels.to(dtype).take(self._unpack(rows[..., start:]) + tables.starts)
        if coding.token_scale:
            dense = dense * halves[..., 1:2] + halves[..., :1]
        zeros = dense.new_zeros(()).expand(*dense.shape[:-1], self.width - self._halves - self._coded)
        x = torch.cat([halves[..., scales + sparse :], dense, zeros], -1)
        x = x if tables.back is None else x[..., tables.back]
        if not sparse:
            return x
        places = decode_half(rows[..., : 2 * sparse]).view(torch.int16).long() & 0xFFFF
        return x.scatter(-1, places, halves[..., scales : scales + sparse])

    def _token_scale(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Outliers' places, zero point and scale [N,1] of tokens: the rest of a token lies within -1 and 1."""
        smallest = self.coding.outliers // 2
        largest = self.coding.outliers - smallest
        high, high_places = x.topk(largest + 1)
        low, low_places = x.topk(smallest + 1, largest=False)
        zero, scale = (high[:, -1:] + low[:, -1:]) / 2, (high[:, -1:] - low[:, -1:]) / 2
        scale = scale.clamp(FLOAT16_TINY, FLOAT16_MAX)
        places = torch.cat([high_places[:, :-1], low_places[:, :-1]], -1) if self.coding.outliers else None
        return places, zero.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float(), scale.half().float()

    def _outliers(self, ordered: Tensor, codes: Tensor, tables: _Tables) -> Tensor:
        """Places [N, outliers] of the coefficients that are farthest from what their code says."""
        halves, stop = self._halves, self._halves + self._coded
        error = ordered.clone()
        error[:, :halves] = 0
        error[:, halves:stop] -= tables.levels.take(codes + tables.starts)
        places = (error.abs() / tables.steps).topk(self.coding.outliers).indices
        return places if tables.order is None else tables.order[places]

    def _pack(self, codes: Tensor) -> list[Tensor]:
        """The planes of codes [N, n]."""
        parts = dict(zip(self._classes, codes.split([count for _, count in self._classes], -1), strict=True))
        planes = []
        for plane in PLANES[1:]:
            held = [part >> (bits & plane - 1) & 2**plane - 1 for (bits, _), part in parts.items() if bits & plane]
            if held:
                planes.append(pack(torch.cat(held, -1), plane))
        return planes

    def _unpack(self, packed: Tensor) -> Tensor:
        """The codes [..., n] that lie in the planes."""
        codes: dict[int, Tensor] = {}
        start = 0
        for plane in PLANES[1:]:
            held = [(bits, count) for bits, count in self._classes if bits & plane]
            total = sum(count for _, count in held)
            stop = start - (-total * plane // 8)
            part = unpack(packed[..., start:stop], plane, total)
            for (bits, _), each in zip(held, part.split([count for _, count in held], -1), strict=True):
                codes[bits] = each if bits not in codes else codes[bits] << plane | each
            start = stop
        return torch.cat([codes[bits] for bits, _ in self._classes], -1) if codes else packed[..., :0]

    def _tables(self) -> _Tables:
        """What follows from the levels, made again when they change."""
        source = self.levels
        version = 0 if source.is_inference() else source._version
        found = self._prepared
        if found is None or found.source is not source or found.version != version:
            found = self._prepared = self._prepare(source, version)
        return found

    def _prepare(self, source: Tensor, version: int) -> _Tables:
        widths, device = self._widths, source.device
        levels = source.detach().float()
        if not levels.isfinite().all():
            raise ValueError("levels of a coded cache: some are not finite, the tables are damaged")
        order = None if self._order is None else torch.tensor(self._order, device=device)
        size = torch.tensor([2**bits if 0 < bits < 16 else 0 for bits in widths], device=device)
        start = size.cumsum(0) - size
        if order is not None:
            size, start = size[order], start[order]
        coded = slice(self._halves, self._halves + self._coded)
        size, start = size[coded, None], start[coded, None]
        most = 2 ** self._classes[0][0] if self._classes else 1
        places = torch.arange(most, device=device)
        table = levels.take((start + places).clamp(max=max(0, len(levels) - 1))) if len(levels) else start.float()
        table = torch.where(places < size, table, torch.inf)
        if (table[:, 1:] < table[:, :-1]).any():
            raise ValueError("levels of a coded cache: some are not sorted, the tables are damaged")
        last = levels.take(start + size - 1) if len(levels) else start.float()
        step = ((last - table[:, :1]) / (size - 1).clamp(min=1)).clamp(min=1e-30)[:, 0]
        steps = torch.full((self.width,), float(step.mean()) if len(step) else 1.0, device=device)
        steps[coded] = step
        return _Tables(
            source,
            version,
            levels,
            start[:, 0],
            (table[:, 1:] + table[:, :-1]) / 2,
            steps,
            order,
            None if order is None else order.argsort(),
        )

"""A table for the terminal that no width cuts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

WIDEST = 10_000  # characters; no table is as wide
HEAD = 8  # characters that a column's name may take in a line, though its cells are shorter
LEAST = 12  # characters of the first column, before a column of numbers goes below


class FittedTable:
    """A table whose first columns, ``texts`` of them, are text and whose others are numbers.

    Text is folded where it is too long. Numbers never are: columns that find no room stand in a table below, beside the
    same first columns.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> None:
        self.title, self.columns, self.rows, self.texts = title, columns, rows, texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the title, and as many tables as it takes."""
        yield Text(self.title, style="bold", overflow="fold")
        heads, every = self.columns, [*range(len(self.columns))]
        whole = console.measure(self._table(every, heads), options=options.update(max_width=WIDEST)).maximum
        parts: Iterable[list[int]] = [every]
        if whole > options.max_width:
            heads = [self._head(index) for index in every]
            parts = self._parts(console, options, heads)
        for shown in parts:
            yield self._table(shown, heads)
            yield ""

    def _parts(self, console: Console, options: ConsoleOptions, heads: Sequence[str]) -> Iterator[list[int]]:
        """The columns of each table."""
        texts = list(range(self.texts))
        shown, wide = list(texts), options.update(max_width=WIDEST)
        spare = sum(max(0, self._width(index) - LEAST) for index in texts)  # what folding can give
        for index in range(self.texts, len(self.columns)):
            width = console.measure(self._table([*shown, index], heads), options=wide).maximum
            if width - spare > options.max_width and len(shown) > len(texts):
                yield shown
                shown = list(texts)
            shown.append(index)
        yield shown

    def _width(self, index: int) -> int:
        """Characters of the longest line in a column of cells."""
        lines = (line for row in self.rows for line in row[index].splitlines())
        return max((cell_len(line) for line in lines), default=0)

    def _head(self, index: int) -> str:
        """A column's name, in as many lines as its cells make it."""
        words = self.columns[index].split()
        width = max(self._width(index), *map(cell_len, words or [""]), HEAD)
        return "\n".join(wrap(self.columns[index], width))

    def _table(self, shown: Sequence[int], heads: Sequence[str]) -> Table:
        result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        for index in shown:
            text = index < self.texts
            result.add_column(heads[index], overflow="fold", justify="left" if text else "right", no_wrap=not text)
        for row in self.rows:
            result.add_row(*(row[index] for index in shown))
        return result


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, texts: int = 1) -> FittedTable:
    """A table whose first columns, ``texts`` of them, are text and whose others are numbers."""
    return FittedTable(title, [*columns], [[str(cell) for cell in row] for row in rows], texts)

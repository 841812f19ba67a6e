"""The page that commands leave beside what they wrote: one file, which needs no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.io.work import replace_text
from anymla.report.chart import Chart

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A model's value from 0 to 1 with its standard error, and the original's, drawn in a cell."""

    model: float
    error: float
    original: float | None


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the number by which it sorts, where it leads, and how it is drawn.

    ``shade``: from 0 to 1, how dark it is. ``dots``: values drawn beside the text.
    """

    text: str
    value: float | None = None
    link: str | None = None
    shade: float | None = None
    dots: Dots | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells below their columns; ``texts``: whether all cells are texts, which keep their line breaks."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    texts: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Returns which columns hold numbers."""
        return tuple(any(cell.value is not None for cell in column) for column in zip(*self.rows, strict=True))


@dataclass(frozen=True)
class Tile:
    """One of the figures on top of a page, and what it is compared with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Command:
    """A command to copy, and what it does."""

    does: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; ``folded``: whether it is closed until it is asked for."""

    heading: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    commands: tuple[Command, ...] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of a page, from its title to what was recorded."""

    title: str
    lead: str
    tiles: tuple[Tile, ...] = ()
    sections: tuple[Section, ...] = field(default=())

    def to_html(self) -> str:
        """The page as one file."""
        return _template().render(page=self, sections=[each for each in self.sections if _filled(each)])

    def write(self, folder: Path) -> None:
        """Writes report.html into ``folder``, in the place of an earlier one."""
        text = self.to_html()
        (folder / PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may be no text


def tell_place(folder: Path, made: Path, place: Path) -> None:
    """Lets the page in ``folder``, if there is one, name ``place`` where it names the folder it was ``made`` in."""
    from markupsafe import escape

    if (path := folder / PAGE).is_file():
        text = path.read_text(encoding="utf-8")
        for old, new in ((str(made), str(place)), (shlex.quote(str(made)), shlex.quote(str(place)))):
            text = text.replace(str(escape(old)), str(escape(new)))
        replace_text(path, text)


def _filled(section: Section) -> bool:
    tables = [table for table in section.tables if table.rows]
    return bool(section.text or section.charts or tables or section.commands)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("anymla", "report")
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **options).get_template("page.html")


def number(text: str, value: float | None, **rest: Any) -> Cell:
    """A cell that sorts by ``value``."""
    return Cell(text, value, **rest)


def record(name: str, content: Mapping[str, Any]) -> Section:
    """All that the JSON file ``name`` holds, to the last digit; lists of objects are tables of their own."""
    single, lists = [], []
    for place, value in _flat(content):
        if isinstance(value, list):
            lists.append(_list_table(place, value))
        else:
            single.append((Cell(place), Cell(_exact(value).text)))
    tables = (Table(columns=("name", "value"), rows=tuple(single)), *lists)
    return Section(heading=f"All of {name}", tables=tables, folded=True)


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its path; lists of objects stay whole."""
    for name, value in content.items():
        place = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{place}.")
        else:
            yield place, [*value] if _holds_objects(value) else _plain(value)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _list_table(place: str, items: Sequence[Mapping[str, Any]]) -> Table:
    """A row per object; what lies deeper in one is a column under its path."""
    rows = [{name: _plain(value) for name, value in _flat(item)} for item in items]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = tuple(tuple(_exact(row[name]) if name in row else Cell("") for name in columns) for row in rows)
    return Table(columns=columns, rows=cells, caption=place)


def _exact(value: Any) -> Cell:
    """A value as JSON has it."""
    if isinstance(value, str):
        return Cell(value)
    return Cell(json.dumps(value), value if isinstance(value, int | float) else None)

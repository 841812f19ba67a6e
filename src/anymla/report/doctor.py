"""What `anymla doctor` shows on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from anymla.report.units import size

if TYPE_CHECKING:
    from anymla.doctor import DeviceFound, Examination

Row = tuple[str, str]
WITHOUT_C = "in torch, several times slower: a C compiler named cc, or the one in $CC, would be used"


def doctor_table(found: Examination, install: dict[str, str]) -> Table:
    """All that was found, in groups; ``install``: by extra, what installs it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for column in ("group", "what", "found"):
        table.add_column(column, overflow="fold", style="bold" if column == "group" else None)
    for name, rows in _groups(found, install):
        for number, row in enumerate(rows):
            table.add_row("" if number else name, *row)
    return table


def _groups(found: Examination, install: dict[str, str]) -> Iterator[tuple[str, Iterable[Row]]]:
    yield "versions", _versions(found)
    yield "devices", [(each.device, _of_device(each)) for each in found.devices]
    verdict = {True: "fast", False: "slow: anymla computes in float32"}
    yield (
        "dtypes on the CPU",
        [
            (each.dtype, f"{verdict[each.fast]} ({each.times_float32:.1f} times as long as in float32)")
            for each in found.dtypes
        ],
    )
    if found.codes_in_c is not None:
        yield "decode on the CPU", [("caches of codes", "in C" if found.codes_in_c else WITHOUT_C)]
    yield "free disk", [(size(each.free_bytes), f"{each.purpose}, {each.folder}") for each in found.disks]
    yield (
        "optional",
        [(name, "installed" if not lacking else install[name]) for name, lacking in found.extras.items()],
    )
    yield "engines", [(each.name, ", ".join(each.found) or f"not found: {each.install}") for each in found.engines]


def _of_device(device: DeviceFound) -> str:
    return device.what if device.memory_bytes is None else f"{device.what}, {size(device.memory_bytes)}"


def _versions(found: Examination) -> Iterator[Row]:
    yield "anymla", found.anymla
    yield "Python", found.python
    for package in found.packages:
        if package.extra is not None:
            continue
        if not package.fits:
            has = "" if package.installed is None else f" (here: {package.installed})"
            yield package.name, f"MISSING: pip install '{package.needed}'{has}"
        elif package.name == "transformers" and found.tested is not None:
            tested = f"tested with {' to '.join(found.tested)}"
            yield package.name, f"{package.installed} ({'' if found.transformers_tested else 'NOT TESTED: '}{tested})"
        elif package.name == "torch":
            yield package.name, str(package.installed)

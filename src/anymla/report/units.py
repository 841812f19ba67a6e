"""Bytes, times and shares as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def size(value: float) -> str:
    """Bytes in the unit that reads best."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def unit_of(values: Iterable[float]) -> tuple[str, int]:
    """The unit of bytes in which the largest of ``values`` reads best, and its bytes."""
    largest = max(values)
    return next((name, each) for name, each in UNITS if largest >= each or each == 1)


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent."""
    return f"{100 * part / whole:.3g} %" if whole else "-"


def measured(value: float | None, error: float | None) -> str:
    """A score with its standard error, where there is one."""
    if value is None:
        return "-"
    return f"{value:.4f} ± {error:.2g}" if error else f"{value:.4f}"


def text_read(name: str, tokens: int, length: int) -> str:
    """What text was read, how much of it, in which windows; a short text is one window."""
    return f"{tokens:,} tokens of {name} in windows of {min(length, tokens):,}"

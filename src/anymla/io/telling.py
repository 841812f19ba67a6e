"""What a long command is at, in words, for whoever shows it. Nobody need listen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Hearer = Callable[[str], None]
Step = TypeVar("Step")
_hearer: ContextVar[Hearer | None] = ContextVar("hearer", default=None)


@contextmanager
def hearing(hearer: Hearer) -> Iterator[None]:
    """Within the block ``hearer`` is told what is being done."""
    before = _hearer.set(hearer)
    try:
        yield
    finally:
        _hearer.reset(before)


def tell(what: str) -> None:
    """Says what begins now, such as "writing"."""
    if (hearer := _hearer.get()) is not None:
        hearer(what)


def told(steps: Sequence[Step], what: str) -> Iterator[Step]:
    """``steps``, of which each says its number when it begins."""
    for number, step in enumerate(steps, 1):
        tell(f"{what} {number} of {len(steps)}")
        yield step

"""Tells how far a download from the hub is. The hub client's own bars write to terminals only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Listener = Callable[[int, int], None]  # (bytes that are there, bytes known by now of all files)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block ``listener`` is told how far downloads are, in place of the hub client's bars."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def bar_class() -> type | None:
    """Returns what the hub client is to make its bars of: None for its own."""
    listener = _listener.get()
    return None if listener is None else _telling(listener)


def _telling(listener: Listener) -> type:
    from tqdm.auto import tqdm

    bars: list[Any] = []  # of bytes: what came over the network, and what is on the disk

    class Telling(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": False})
            self.counts_bytes = kwargs.get("unit") == "B"
            if self.counts_bytes:
                bars.append(self)

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Draws nothing."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.counts_bytes:
                listener(int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars)))

        def close(self) -> None:
            self.disable = True  # else it ends its line, which it did not write

    return Telling

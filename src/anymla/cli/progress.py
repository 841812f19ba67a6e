"""How far a command is: a bar on a terminal; elsewhere lines, so that a log of hours of work is not empty."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol

from anymla.cli.options import err, first_process
from anymla.io.download import listening
from anymla.io.telling import hearing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from anymla.evaluation.likelihood import Track

EVERY = 30.0  # seconds between two lines, at least
LONG = 10.0  # seconds; a shorter step tells of itself soon enough


class Report(Protocol):
    """Called with what is ``done`` of ``total`` by now; another ``what`` begins another phase, timed on its own."""

    def __call__(
        self, done: int, total: int | None, what: str, detail: str = "", amount: Callable[[int], str] = str
    ) -> None:
        """Takes a step's end.

        ``total``: None where nobody knows it. ``detail``: of the last step. ``amount``: how to write ``done``.
        """


@contextmanager
def shown(command: str) -> Iterator[Report]:
    """Shows on stderr how far ``command`` and its downloads are. Of several processes the first one speaks."""
    from anymla.report.units import size

    if not first_process():
        yield lambda *_, **__: None
        return
    report = Bar(err) if err.is_terminal else Lines(command, err.file)
    download = listening(lambda done, total: report(done, total, "download", amount=size))
    with report, download, hearing(report.part):
        yield report


def tracked(report: Report) -> Track:
    """Steps that are reported as they are taken."""

    def track(steps: Sequence[Any], text: str) -> Iterable[Any]:
        report(0, len(steps), f"{text}:")
        for done, step in enumerate(steps, 1):
            yield step
            report(done, len(steps), f"{text}:")

    return track


@dataclass
class _Phase:
    """One kind of steps: how far it was at first, and how far it was last, each with its time in seconds."""

    what: str
    first: tuple[int, float]
    last: tuple[int, float]
    total: int | None
    text: str = ""  # what its last report said
    lines: int = 0
    silent: bool = True  # whether the last report was not printed
    part: str = ""  # what is being done since

    @property
    def at_work(self) -> str:
        """Returns what it says while a step takes long."""
        done = self.text and f"{self.text}{' done' if self.total else ''}"
        return done if not self.part else f"{done}, {self.part}" if self.total else self.part

    def seconds_left(self, now: float) -> float | None:
        """By the mean of the steps of this run; None before there is one."""
        (before, begun), (done, ended) = self.first, self.last
        if self.total is None or done <= before or done >= self.total:
            return None
        each = (ended - begun) / (done - before)
        return max(each * (self.total - done) - (now - ended), each * (self.total - done - 1))


class Lines:
    """Lines on ``stream``: when the first step is done, at most one per 30 s from then on, and the last step's.

    Where a step takes long, a line per 30 s says that it is at work.
    """

    def __init__(self, command: str, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.command, self.stream, self.clock = command, stream, clock
        self.begun = self.printed = clock()
        self.phase: _Phase | None = None
        self.lines = 0
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._print_last()

    def __call__(
        self, done: int, total: int | None, what: str, detail: str = "", amount: Callable[[int], str] = str
    ) -> None:
        """Takes a step's end; see :class:`Report`."""
        with self._lock:
            now = self.clock()
            if self.phase is None or what != self.phase.what or done < self.phase.last[0]:
                if self.phase is not None and self.phase.lines:
                    self._print_last()
                self.phase = _Phase(what, (done, now), (done, now), total)
            phase = self.phase
            phase.last, phase.total, phase.silent, phase.part = (done, now), total, True, ""
            phase.text = what if total is None else f"{what} {amount(done)} of {amount(total)}"
            phase.text += f" ({detail})" if detail else ""
            if done and (not self.lines or now - self.printed >= EVERY):
                self._print_last()

    def part(self, what: str) -> None:
        """Takes what a step is at, in words."""
        with self._lock:
            if self.phase is None:
                now = self.clock()
                self.phase = _Phase("", (0, now), (0, now), None)
            self.phase.part = what

    def beat(self) -> None:
        """Says that the command is at work, where nothing was said for 30 s and a step takes long."""
        with self._lock:
            now, reported = self.clock(), self.begun if self.phase is None else self.phase.last[1]
            if now - self.printed >= (EVERY if self.lines else LONG) and now - reported >= LONG:
                text = "" if self.phase is None else f"{self.phase.at_work}, "
                self._print(text, now, " so far")

    def _keep_beating(self) -> None:
        while not self._stop.wait(1):
            self.beat()

    def _print_last(self) -> None:
        """Prints the last step, as of its end, where there is one and that was not done yet."""
        if self.phase is not None and self.phase.silent and self.phase.last[0]:
            self.phase.silent = False
            self._print(f"{self.phase.text}, ", self.phase.last[1])

    def _print(self, text: str, now: float, ending: str = "") -> None:
        left = None if self.phase is None else self.phase.seconds_left(now)
        ending += "" if left is None else f", about {left:.0f} s left"
        with suppress(OSError, ValueError):  # a log that is gone stops no work
            self.stream.write(f"{self.command}: {text}{now - self.begun:.0f} s{ending}\n")
            self.stream.flush()
        self.printed = self.clock()
        self.lines += 1
        if self.phase is not None:
            self.phase.lines += 1


class Bar:
    """A bar for each phase, on a terminal; it goes once the phase is done."""

    def __init__(self, console: Console) -> None:
        self.console, self.what, self.text = console, "", ""
        self.live: Progress | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(
        self, done: int, total: int | None, what: str, detail: str = "", amount: Callable[[int], str] = str
    ) -> None:
        """Takes a step's end; see :class:`Report`."""
        with self._lock:
            if self.live is None or what != self.what:
                self.close()
                self.what, self.live = what, self._bar()
                self.live.start()
                self.live.add_task(what, total=total, amount="")
            (task,) = self.live.task_ids
            self.text = f"{what} {detail}" if detail else what
            of = "" if total is None else f"{amount(done)} of {amount(total)}"
            self.live.update(task, description=self.text, completed=done, total=total, amount=of)
            if done == total:
                self.close()

    def part(self, what: str) -> None:
        """Takes what a step is at, in words."""
        with self._lock:
            if self.live is None:
                return self(0, None, what)
            (task,) = self.live.tasks
            text = what if task.total is None else f"{self.text}; {what}"
            self.live.update(task.id, description=text)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        with self._lock:
            if self.live is not None:
                self.live.stop()
            self.live = None

    def _bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        return Progress(*columns, *times, console=self.console, transient=True, speed_estimate_period=math.inf)

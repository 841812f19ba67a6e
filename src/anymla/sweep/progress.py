"""Which work a work folder belongs to, and what becomes of it when it stops early; for sweeps and trainings alike."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anymla.distributed import first_decides, rank, world
from anymla.errors import AnymlaError, OutputError
from anymla.io.checkpoint import check_space, check_weights
from anymla.io.computing import Computing, computing_dtype
from anymla.io.safetensors import scan
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.settings import DtypeName, Settings


def fingerprint(settings: Settings, **inputs: Any) -> dict[str, Any]:
    """What the new weights depend on: settings, what ``inputs`` are, and how many processes run which torch."""
    return {"recipe": settings.model_dump(mode="json"), **inputs, "processes": world(), "torch": torch.__version__}


def model_hash(folder: Path, dtype: DtypeName | None = None) -> list[Any]:
    """What tells a checkpoint from all others. Reads every weight once, and finds it finite, in ``dtype`` too.

    Files are hashed whole: the same read also looks for NaN, and a sampled hash would miss a changed tensor.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return [config, *([file.name, scan(file, dtype)] for file in sorted(check_weights(folder)))]


def claim(work: WorkFolder, fingerprint: Callable[[], dict[str, Any]], *, restart: bool) -> None:
    """Opens ``work`` in the first of all processes; all then know what is done.

    ``fingerprint``: gives what must be the same to go on.

    Raises:
        CheckpointError: a weight is not finite.
        OutputError: the folder belongs to other work or cannot be written.
    """
    if rank() == 0:
        try:
            work.open(fingerprint(), restart=restart)
        except AnymlaError:
            raise
        except OSError as error:
            raise OutputError(f"{work.output} could not be written: {error}") from error
    work.progress = first_decides(work.progress)


def decide_computing(work: WorkFolder, stored: str, device: str, asked: str | None) -> Computing:
    """What to compute in: what the stopped work was computed in, else what the first of all processes chooses."""
    if "computing" not in work.progress:
        work.progress["computing"] = first_decides(asdict(computing_dtype(stored, device, asked)))
    return Computing(**work.progress["computing"])


def check_room(work: WorkFolder, source: StreamedModel, hidden_bytes: int) -> None:
    """Refuses to begin where the disk has no room for the new weights and ``hidden_bytes`` of activations.

    Raises:
        OSError: not enough room.
    """
    if not work.progress["layers"]:
        tensors = source.model.state_dict()
        weights = sum(tensor.numel() * source.saved[name].itemsize for name, tensor in tensors.items())
        check_space(work.path, weights + hidden_bytes)


@contextmanager
def keep_when_stopped(
    work: WorkFolder, done: Callable[[], str], *, always: bool = False, note: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Keeps ``work`` when the block is stopped after something is done, and says how to go on.

    Before that nothing is left, nor where the same command would fail again, unless ``always`` is set. SIGTERM stops
    the block as Ctrl-C does. ``done``: how much is, as "2 of 5 layers". ``note``: called with that at first, where the
    work was begun before.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """

    def told(otherwise: str = "") -> str:
        if not work.begun:
            return otherwise
        return f"; {done()} are kept: the same command goes on, with --restart it begins anew"

    if work.begun and note is not None:
        note(f"this goes on with what was kept: {done()}; --restart begins anew")
    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"stopped{told('; nothing is left')}")
        raise
    except AnymlaError as error:
        if not (always or isinstance(error.__cause__, OSError) or out_of_memory(error.__cause__)):
            if rank() == 0:
                work.discard()
            raise
        raise type(error)(f"{error}{told()}") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        left = told("; nothing was left there")
        raise OutputError(f"{work.output} could not be written: {reason}{left}") from error
    finally:
        if rank() == 0 and not work.begun:
            work.discard()
        work.release()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether there was too little memory, of any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM stop the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

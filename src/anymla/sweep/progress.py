"""Which conversion a work folder belongs to, and what becomes of it when the conversion stops early."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anymla.distributed import first_decides, rank, world
from anymla.errors import AnymlaError, OutputError
from anymla.io.checkpoint import check_space
from anymla.io.computing import Computing, computing_dtype
from anymla.io.safetensors import scan
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.mla.plan import MLAPlan


def fingerprint(source: StreamedModel, plan: MLAPlan, windows: Tensor) -> dict[str, Any]:
    """What the new weights depend on. Reads every weight once, and finds it finite.

    Files are hashed whole: the same read also looks for NaN, and a sampled hash would miss a changed tensor.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    files = sorted({tensor.file for tensor in source.stored.values()})
    config = (source.folder / "config.json").read_bytes()
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "plan": [layer if layer is None else layer.model_dump(mode="json") for layer in plan.layers],
        "device": torch.device(source.device).type,
        "processes": world(),
        "torch": torch.__version__,
        "calibration text": [hashlib.sha256(windows.numpy().tobytes()).hexdigest()],
        "source": [hashlib.sha256(config).hexdigest(), *([file.name, scan(file, plan.recipe.dtype)] for file in files)],
    }


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
def kept(work: WorkFolder, layers: int) -> Iterator[None]:
    """Keeps ``work`` when the block is stopped behind at least one of ``layers`` layers, and says how to go on.

    Before that, and where the same command would fail again, nothing is left. SIGTERM stops the block as Ctrl-C does.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"stopped{_what_is_kept(work, layers) or '; nothing is left'}")
        raise
    except AnymlaError as error:
        if not isinstance(error.__cause__, OSError):
            if rank() == 0:
                work.discard()
            raise
        raise type(error)(f"{error}{_what_is_kept(work, layers)}") from error
    except OSError as error:
        left = _what_is_kept(work, layers) or "; nothing was left there"
        raise OutputError(f"{work.output} could not be written: {' '.join(str(error).split())}{left}") from error
    finally:
        if rank() == 0 and not work.progress["layers"]:
            work.discard()
        work.release()


def _what_is_kept(work: WorkFolder, layers: int) -> str:
    if not (done := len(work.progress["layers"])):
        return ""
    return f"; {done} of {layers} layers are kept: the same command goes on, with --restart it begins anew"


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

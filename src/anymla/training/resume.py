"""Which tuning a work folder belongs to, where it goes on, and what becomes of it when it stops early."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anymla.data.mixture import Source
from anymla.distributed import rank, world
from anymla.errors import AnymlaError, OutputError, RecipeError
from anymla.io.checkpoint import check_weights
from anymla.io.safetensors import scan
from anymla.io.work import WorkFolder
from anymla.methods.tune import Tune
from anymla.sweep.progress import terminated_as_interrupted
from anymla.training.stages import Stage


def fingerprint(converted: Path, teacher: Path, tuning: Tune) -> dict[str, Any]:
    """What the new weights depend on. Weight files and local texts are hashed whole."""
    texts = [Source.of(text).name for text in tuning.data or []] + [tuning.eval_data or ""]
    return {
        "recipe": tuning.model_dump(mode="json"),
        "converted model": _model_hash(converted),
        "teacher": _model_hash(teacher),
        "data": [_text_hash(text) for text in texts],
        "processes": world(),
        "torch": torch.__version__,
    }


def _model_hash(folder: Path) -> list[Any]:
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return [config, *([file.name, scan(file, None)] for file in check_weights(folder))]


def _text_hash(name: str) -> str:
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def done_steps(work: WorkFolder, stages: list[Stage]) -> int:
    """Steps, over all stages, behind which ``work`` goes on."""
    if not work.progress.get("checkpoints"):
        return 0
    name, step = work.progress["checkpoints"][0]
    names = [stage.name for stage in stages]
    return sum(stage.steps for stage in stages[: names.index(name)]) + int(step)


@contextmanager
def keep_when_stopped(work: WorkFolder, stages: list[Stage], tuning: Tune) -> Iterator[None]:
    """Keeps ``work`` when the block is stopped behind a checkpoint, and says how to go on; else nothing is left.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
        RecipeError: out of memory; names the settings that take less, and what they are.
    """
    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"stopped{_what_is_kept(work, stages) or '; nothing is left'}")
        raise
    except AnymlaError as error:
        raise type(error)(f"{error}{_what_is_kept(work, stages)}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise RecipeError(f"{out_of_memory(error, tuning, stages)}{_what_is_kept(work, stages)}") from error
    except OSError as error:
        left = _what_is_kept(work, stages) or "; nothing was left there"
        raise OutputError(f"{work.output} could not be written: {' '.join(str(error).split())}{left}") from error
    finally:
        if rank() == 0 and not work.progress.get("checkpoints"):
            work.discard()
        work.release()


def _what_is_kept(work: WorkFolder, stages: list[Stage]) -> str:
    if not (done := done_steps(work, stages)):
        return ""
    steps = sum(stage.steps for stage in stages)
    return f"; {done} of {steps} steps are kept: the same command goes on, with --restart it begins anew"


def out_of_memory(error: BaseException, tuning: Tune, stages: list[Stage]) -> str:
    """One line: which settings take less memory, and what they are now."""
    levers = [f"--micro-batch {stages[0].micro}", f"--length {stages[0].length}"]
    options = [
        *(["--gradient-checkpointing"] if not tuning.gradient_checkpointing else []),
        *([f"--train lora (now {tuning.train})"] if tuning.train != "lora" else []),
        *(["--precision bfloat16"] if tuning.precision != "bfloat16" else []),
        *(["several processes with --parallel fsdp"] if tuning.parallel != "fsdp" else []),
    ]
    reason = " ".join(str(error).split())
    return f"out of memory ({reason:.120}); lower {' or '.join(levers)}, or give {', '.join(options)}"

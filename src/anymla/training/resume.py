"""Which tuning a work folder belongs to, where it goes on, and what becomes of it when it stops early."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anymla.data.mixture import Source
from anymla.errors import RecipeError
from anymla.io.work import WorkFolder
from anymla.methods.tune import Tune
from anymla.sweep.progress import fingerprint, keep_when_stopped, model_hash, out_of_memory
from anymla.training.stages import Stage


def tuning_fingerprint(converted: Path, teacher: Path, tuning: Tune) -> dict[str, Any]:
    """What the new weights depend on. Weight files and local texts are hashed whole."""
    texts = [Source.of(text).name for text in tuning.data or []] + [tuning.eval_data or ""]
    return fingerprint(
        tuning,
        **{"converted model": model_hash(converted), "teacher": model_hash(teacher)},
        data=[_text_hash(text) for text in texts],
    )


def _text_hash(name: str) -> str:
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def done_steps(work: WorkFolder, stages: list[Stage]) -> int:
    """Steps, over all stages, after which ``work`` goes on."""
    if not work.progress.get("checkpoints"):
        return 0
    name, step = work.progress["checkpoints"][0]
    names = [stage.name for stage in stages]
    return sum(stage.steps for stage in stages[: names.index(name)]) + int(step)


@contextmanager
def keep_steps_when_stopped(work: WorkFolder, stages: list[Stage], tuning: Tune) -> Iterator[None]:
    """Keeps ``work`` when the block is stopped after a checkpoint, and says how to go on; else nothing is left.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
        RecipeError: out of memory; names the settings that take less, and what they are.
    """
    steps = sum(stage.steps for stage in stages)

    def done() -> str:
        trials = f"{len(work.progress['trials'])} trials of the rate and " if work.progress.get("trials") else ""
        return f"{trials}{done_steps(work, stages)} of {steps} steps"

    with keep_when_stopped(work, done, always=True):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise RecipeError(less_memory(error, tuning, stages)) from error


def less_memory(error: BaseException, tuning: Tune, stages: list[Stage]) -> str:
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

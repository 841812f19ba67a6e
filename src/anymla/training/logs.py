"""What a run leaves to look at: metrics.jsonl, and calls for a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from anymla.io.work import WorkFolder
from anymla.methods.tune import STEP

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TuneProgress:
    """Where a run is: ``step`` of ``steps`` over all stages, tokens learned from, and the last loss.

    ``what`` is counted: steps of the run, or those of one of the trials before it.
    """

    stage: str
    step: int
    steps: int
    tokens: int
    loss: float | None
    what: str = STEP


Progress = Callable[[TuneProgress], None]


@dataclass(frozen=True)
class Place:
    """Where one stage stands in the whole run: steps before it, of ``steps`` in all, and tokens per step."""

    stage: str
    before: int
    steps: int
    step_tokens: int
    what: str = STEP


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Appends a line to metrics.jsonl per step and per scoring, in the first process, and tells ``progress``.

    ``folder``: where the file is; None: it is not written.
    """

    def __init__(self, folder: Path | None, place: Place, progress: Progress | None) -> None:
        self.path, self.place, self.progress = None if folder is None else folder / METRICS, place, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes from ``logs`` what belongs there; transformers also logs a summary, which does not."""
        logs, step = logs or {}, self.place.before + state.global_step
        if not state.is_world_process_zero or not {"loss", "eval_kl"} & logs.keys():
            return
        names = ("loss", "learning_rate", "grad_norm", "eval_perplexity", "eval_kl", "original_perplexity")
        line = {"stage": self.place.stage, "step": step, "tokens": step * self.place.step_tokens}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {name: float(logs[name]) for name in names if name in logs}) + "\n")
        if self.progress is not None and "loss" in logs:
            self.progress(TuneProgress(**line, steps=self.place.steps, loss=logs["loss"], what=self.place.what))


class Keep(TrainerCallback):  # type: ignore[misc]
    """Scores at a stage's end, and counts a checkpoint in ``work`` once every process has written its part.

    The checkpoint of the last step, or of an early end, is not counted: what follows it is the stage's result.
    """

    def __init__(self, work: WorkFolder, stage: str) -> None:
        self.work, self.stage = work, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for scores after the last step."""
        control.should_evaluate |= state.global_step >= state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the checkpoint."""
        from anymla.distributed import rank, wait_for_all

        wait_for_all()
        if rank() == 0 and state.global_step < state.max_steps and not control.should_training_stop:
            self.work.commit(checkpoints=[[self.stage, state.global_step]])
        wait_for_all()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was being written when the process was killed is left out."""
    lines = []
    if (path := folder / METRICS).is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def scored_in(lines: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Those that hold scores: of the run's start, and of ``stage``."""
    scored = [line for line in lines if "eval_kl" in line]
    return scored[:1] + [line for line in scored[1:] if line["stage"] == stage]


def rewind_metrics(folder: Path, step: int) -> None:
    """Removes the lines after ``step``, where a stopped run goes on."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
    (folder / METRICS).write_text("".join(kept), encoding="utf-8")

"""Runs surveys in processes of their own: under torchrun, or in forked ones that are killed.

    torchrun --nproc-per-node 2 -m tests.survey_process facts MODEL FOLDER
    python -m tests.survey_process kills MODEL FOLDER SEED KILLS

``facts`` writes each survey's to FOLDER. ``kills`` ends a process just before one of its file operations, lets another
go on, and prints per survey the points in all, and per kill whether the facts are equal and how many layers were kept.
"""

import json
import random
import sys
from pathlib import Path

import torch

from anymla.distributed import join_processes, rank
from tests.families import token_ids
from tests.kill_points import Points, forked
from tests.surveys import Fisher, Hidden, Taylor, digest, in_memory, surveyed

SURVEYS = {"fisher": Fisher, "hidden": Hidden, "taylor": Taylor}
WINDOWS = token_ids(batch=8, length=12)


def in_child(kind: str, model: Path, output: Path, kill_at: int | None = None) -> dict:
    """Surveys in a forked process: how it ended, the facts' digest, file operations, and passes it had to make."""

    def survey(_: Points) -> dict:
        return {"digest": digest(surveyed(SURVEYS[kind](), model, WINDOWS, output, memory=0))}

    return forked(survey, output.parent, kill_at)


def kept(output: Path) -> list:
    """How far a killed survey came."""
    path = output.with_name(f".{output.name}.partial") / ".work" / "progress.json"
    progress = json.loads(path.read_text()) if path.is_file() else {}
    return [len(progress.get("survey", [])), progress.get("gradient_after")]


def kill(model: Path, folder: Path, seed: int, kills: int) -> dict:
    """Per survey: points in all, and what became of each kill."""
    report = {}
    for kind in SURVEYS:
        whole = in_child(kind, model, folder / kind / "out")
        trials = []
        for point in random.Random(seed).sample(range(whole["points"]), min(kills, whole["points"])):
            output = folder / f"{kind}-{point}" / "out"
            killed = in_child(kind, model, output, point)["code"]
            far = kept(output)
            trials.append([killed, far, in_child(kind, model, output).get("digest") == whole["digest"]])
        report[kind] = {"points": whole["points"], "trials": trials}
    return report


def main() -> None:
    torch.set_num_threads(1)  # forked processes have no others
    task, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if task == "kills":
        sys.stdout.write(json.dumps(kill(model, folder, int(sys.argv[4]), int(sys.argv[5]))))
        return
    join_processes("cpu")
    for kind, survey in SURVEYS.items():
        torch.save(in_memory(surveyed(survey(), model, WINDOWS, folder / kind)), folder / f"{kind}-{rank()}.pt")


if __name__ == "__main__":
    main()

"""Kills runs at counted points and lets them go on, as kill_points does to conversions; a script, so that it may fork.

Every step has as many kills.

    python -m tests.run_kill_points MODEL FOLDER SEED KILLS STEPS

Prints one JSON object: points in all, and per kill the point, the step it was in and the files that differ at the end.
"""

import json
import random
import sys
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path

import torch

import anymla
import anymla.evaluation.held_out
import anymla.runner
import anymla.sweep.checkpoint
import anymla.sweep.sequence
import anymla.training.tune
from tests.kill_points import Points, forked

TIMED = {"conversion.json", "tuning.json", "run.json", "report.html", "metrics.jsonl"}


def in_child(model: str, output: Path, steps: list, kill_at: int | None = None) -> dict:
    """Runs in a forked process; how many points there were when each step began."""

    def run(points: Points) -> dict:
        begun = []
        anymla.run(model, output, steps=steps, progress=lambda _, step, *told: told or begun.append(points.seen))
        return {"begun": begun}

    return forked(run, output.parent, kill_at)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def main() -> None:
    torch.set_num_threads(1)  # forked processes have no others
    model, folder, seed, kills, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    steps = json.loads(steps)
    whole = in_child(model, folder / "whole" / "out", steps)
    expected, total = files_of(folder / "whole" / "out"), whole["points"]
    bounds, chosen = [0, *whole["begun"][1:], total], random.Random(seed)
    points = [point for part in pairwise(bounds) for point in chosen.sample(range(*part), kills // (len(bounds) - 1))]
    trials = []
    for point in points:
        output = folder / str(point) / "out"
        first, again = in_child(model, output, steps, point), in_child(model, output, steps)
        found = files_of(output) if output.is_dir() else {}
        names = expected.keys() | found.keys()
        trials.append(
            {
                "point": point,
                "step": bisect_right(bounds, point),
                "killed": first["killed"],
                "code": again["code"],
                "different": sorted(name for name in names if expected.get(name) != found.get(name)),
                "left": sorted(path.name for path in output.parent.iterdir()),
            }
        )
    sys.stdout.write(json.dumps({"points": total, "trials": trials}))


if __name__ == "__main__":
    main()

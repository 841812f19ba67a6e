"""Kills conversions at counted points and lets them go on; a script of its own, so that it may fork.

    python -m tests.kill_points MODEL FOLDER SEED KILLS

A point is a file operation of the conversion (open for writing, rename, remove, ...): the child dies just before it.
Prints one JSON object: points in all, and per kill the point, the layers kept and the files that differ at the end.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import anymla
import anymla.evaluation.held_out
import anymla.methods.mla.choose
import anymla.sweep.run

SETTINGS = {
    "kv_cache": 0.5,
    "calibration_tokens": 1024,
    "calibration_length": 64,
    "max_shard_size": "250KB",
    "reconstruction_steps": 2,
}
WRITES = os.O_WRONLY | os.O_RDWR
CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Points:
    """Counts the file operations in a folder, and kills this process before one of them."""

    def __init__(self, folder: str, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.seen = folder, kill_at, 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        changing = event in CHANGING or (event == "open" and (args[2] or 0) & WRITES)
        if changing and self.folder in str(args[0]):
            if self.seen == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


def forked(work: Callable[[Points], dict], folder: Path, kill_at: int | None = None) -> dict:
    """Does ``work`` in a forked process, whose file operations in ``folder`` count; how it ended, what it reported."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        points = Points(str(folder), kill_at)
        found = work(points)
        os.write(sender, json.dumps({"points": points.seen} | found).encode())
        os._exit(0)
    os.close(sender)
    report = os.fdopen(receiver).read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, "code": os.waitstatus_to_exitcode(status), **json.loads(report or "{}")}


def in_child(model: str, output: Path, kill_at: int | None = None) -> dict:
    """Converts in a forked process."""

    def convert(_: Points) -> dict:
        done = []
        anymla.convert(model, output, progress=lambda layers, *_: done.append(layers), **SETTINGS)
        return {"layers": done}

    return forked(convert, output.parent, kill_at)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("conversion.json", "report.html")
    }


def main() -> None:
    torch.set_num_threads(1)  # forked processes have no others
    model, folder, seed, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    whole = in_child(model, folder / "whole" / "out")
    expected, total = files_of(folder / "whole" / "out"), whole["points"]
    trials = []
    for point in random.Random(seed).sample(range(total), min(kills, total)):
        output = folder / str(point) / "out"
        first = in_child(model, output, point)
        second = in_child(model, output)
        found = files_of(output) if output.is_dir() else {}
        names = expected.keys() | found.keys()
        trials.append(
            {
                "point": point,
                "killed": first["killed"],
                "code": second["code"],
                "first_report": second.get("layers", [None])[:1],
                "different": sorted(name for name in names if expected.get(name) != found.get(name)),
                "left": sorted(path.name for path in output.parent.iterdir()),
            }
        )
    sys.stdout.write(json.dumps({"points": total, "layers": whole["layers"], "trials": trials}))


if __name__ == "__main__":
    main()

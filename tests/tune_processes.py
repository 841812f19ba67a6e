"""Tunes as one of the processes of torchrun, sharing the work in several ways, one after the other.

torchrun --nproc-per-node 2 -m tests.tune_processes CONVERTED TEACHER OUT_FOLDER SETTINGS_JSON WAY...
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import anymla

torch.set_num_threads(1)
converted, teacher, folder, settings, *ways = sys.argv[1:]
for way in ways:
    parallel, _, kill_at = way.partition("-")

    def progress(now, kill_at=kill_at):
        if kill_at and now.step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    output = Path(folder) / parallel
    anymla.tune(converted, output, teacher=teacher, parallel=parallel, progress=progress, **json.loads(settings))

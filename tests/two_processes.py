"""Converts as one of the processes of torchrun, and writes the first layer's moments beside the output.

torchrun --nproc-per-node 2 -m tests.two_processes MODEL OUT
"""

import os
import sys

import torch

import anymla
from anymla.methods.mla.moments import MomentSums
from tests.families import FAST

torch.set_num_threads(1)
seen = []
moments = MomentSums.moments


def keep(sums):
    seen.append(moments(sums))
    return seen[-1]


MomentSums.moments = keep
model, output = sys.argv[1:]
anymla.convert(model, output, kv_cache=0.5, device="cpu", **FAST | {"reconstruction_steps": 0})
anymla.convert(model, f"{output}-stepped", kv_cache=0.5, device="cpu", **FAST)
tables = [{name: value for name, value in vars(layer).items() if name != "sample"} for layer in seen]
torch.save(tables, f"{output}-moments-{os.environ.get('RANK', '0')}.pt")

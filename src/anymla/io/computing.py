"""Which dtype to compute in: the checkpoint's, or float32 where this machine multiplies faster in that."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anymla.io.checkpoint import load_model
from anymla.io.device import machine_memory
from anymla.io.telling import tell

PRODUCT = (128, 512, 512)  # rows, inputs, outputs: large enough that arithmetic takes its time, and not memory
REPEATS = 7  # of which the fastest counts
SLOWER = 1.3  # times float32, from which on a 16-bit dtype is not computed in


@dataclass(frozen=True, kw_only=True)
class Computing:
    """The dtype that is computed in, that of the checkpoint (which is what is saved), and the reason."""

    dtype: str
    stored: str
    reason: str


def computing_dtype(stored: str, device: str, asked: str | None = None) -> Computing:
    """What to compute in on ``device`` with weights in ``stored``; ``asked``, what the user wants, is what counts."""
    if asked is not None:
        return Computing(dtype=asked, stored=asked, reason="asked for")
    if stored in ("bfloat16", "float16") and device == "cpu" and (times := slowdown(stored)) > SLOWER:
        reason = f"products of matrices in {stored} take {times:.1f} times as long on this CPU"
        return Computing(dtype="float32", stored=stored, reason=reason)
    return Computing(dtype=stored, stored=stored, reason="the checkpoint's")


@cache
def slowdown(dtype: str) -> float:
    """How long a product of matrices takes on this CPU in ``dtype``, over its time in float32; in milliseconds.

    On one core, and both in turn: so that what else runs on the machine hardly matters.
    """
    import torch

    rows, inputs, outputs = PRODUCT
    kinds = (getattr(torch, dtype), torch.float32)
    factors = [(torch.ones(rows, inputs, dtype=kind), torch.ones(outputs, inputs, dtype=kind)) for kind in kinds]
    fastest, threads = [float("inf")] * len(kinds), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(REPEATS):
            for number, (left, right) in enumerate(factors):
                begun = time.perf_counter()
                torch.nn.functional.linear(left, right)
                fastest[number] = min(fastest[number], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return fastest[0] / fastest[1]


def load_to_compute(folder: Path, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """As :func:`load_model`; without a ``dtype``, in what this machine computes fast in where it has the memory.

    The model's ``config.dtype`` stays the checkpoint's.
    """
    import torch

    tell(f"loading {folder.name}")
    model = load_model(folder, dtype=dtype, device=device)
    stored = str(model.dtype).removeprefix("torch.")
    fast = getattr(torch, computing_dtype(stored, device, dtype).dtype)
    budget = machine_memory() // 2  # the other model needs some, too
    if fast != model.dtype and fast.itemsize * sum(weight.numel() for weight in model.parameters()) < budget:
        model = model.to(fast)
    return model

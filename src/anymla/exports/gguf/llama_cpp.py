"""Where llama.cpp is installed, and what it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import ParityError
from anymla.exports.cache_loss import CacheLoss, held_out, loss_between
from anymla.exports.parity import Answers, Parity, compare, new_tokens

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

SCRIPT = Path(__file__).with_name("run_llama_cpp.py")
CELL = 12  # bytes of a token's position and sequence in a saved state, beside what is cached of it
# Largest difference of two logits, over their standard deviation, with a float32 cache: what rounding weights to the
# file's dtype does, and with q8_0 and f16 rounding activations too.
TOLERANCE = {"f32": 1e-3, "f16": 0.03, "bf16": 0.2, "q8_0": 0.4}


def llama_python() -> Path | None:
    """A Python that has llama-cpp-python: this one, or None."""
    return Path(sys.executable) if find_spec("llama_cpp") is not None else None


def ask_llama(python: Path, file: Path, prompts: Sequence[list[int]] = (), **request: Any) -> tuple[Any, list[ndarray]]:
    """Returns what run_llama_cpp.py answers, and the logits of every prompt [T,V].

    Raises:
        ParityError: llama.cpp failed; says how.
    """
    import numpy

    logits = file.with_name(f".{file.stem}.npz")
    request |= {"model": str(file), "prompts": list(prompts), "logits": str(logits)}
    own = python == Path(sys.executable)
    command = [python, "-P" if own else "-I", SCRIPT]  # the script's folder, and another Python's paths, stay out
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ParityError(f"llama.cpp cannot run {file.name}: {said:.300}")
    if not prompts:
        return json.loads(done.stdout), []
    with numpy.load(logits) as arrays:
        found = [arrays[f"arr_{number}"] for number in range(len(prompts))]
    logits.unlink()
    return json.loads(done.stdout), found


def check_in_llama(python: Path, converted: Path, file: Path, *, dtype: str, layers: int, cached: int) -> Parity:
    """Compares a GGUF file with the converted model; the cache is measured as llama.cpp saves it.

    ``cached``: the numbers that each of the ``layers`` is to cache per token.

    Raises:
        ParityError: logits or tokens differ by more than the tolerance, or the cache by anything; says by how much.
    """
    import torch

    def answers(prompts: list[Tensor], expected: list[Tensor]) -> Answers:
        _, forced = ask_llama(python, file, [ids[0].tolist() for ids in expected])
        new = new_tokens(prompts, expected)
        found, _ = ask_llama(python, file, [ids[0].tolist() for ids in prompts], new=new)
        before, after, steps = found["bytes"][0]
        return Answers(
            scores=[torch.from_numpy(rows).double() for rows in forced],
            sequences=[
                torch.cat([ids, torch.tensor([own])], dim=1) for ids, own in zip(prompts, found["tokens"], strict=True)
            ],
            cached_numbers=((after - before) / steps - CELL) / 4 / layers,
            version=f"of llama-cpp-python {found['version']}",
        )

    return compare(converted, "llama.cpp", TOLERANCE[dtype], answers, cached=cached)


def llama_loss(python: Path, converted: Path, file: Path, cache: str) -> CacheLoss:
    """Returns what a quantised cache loses of a GGUF file.

    Raises:
        ParityError: llama.cpp failed; says how.
    """
    import torch

    windows = held_out(converted).tolist()
    exact, found = (ask_llama(python, file, windows, cache=kind)[1] for kind in ("f32", cache))
    return loss_between(cache, "llama.cpp", map(torch.from_numpy, exact), map(torch.from_numpy, found))

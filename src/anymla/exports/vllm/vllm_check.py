"""Where vLLM is installed, and what it answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.engine_shapes import GPU
from anymla.exports.parity import (
    LOG_PROBABILITIES,
    TOLERANCE,
    Answers,
    Parity,
    compare,
    new_tokens,
    planned_numbers,
)
from anymla.exports.vllm.run_vllm import MARKER
from anymla.io.config import read_object

if TYPE_CHECKING:
    from torch import Tensor

SCRIPT = Path(__file__).with_name("run_vllm.py")
LIMIT = 600  # seconds: vLLM has been seen to hang as it starts
CPU_SIZES = dict(zip(("kv_lora_rank", "qk_rope_head_dim"), GPU.pads["cpu"], strict=True))  # of its only kernel there
ERROR = re.compile(r"^[\w.]*(?:Error|Exception)\b.*")


class VllmError(Exception):
    """vLLM did not answer; the message says why, in short."""


class VllmUnsuitedError(Exception):
    """vLLM as it is installed here is not what the check was made for; the message says why, in short."""


def vllm_python() -> Path | None:
    """A Python that has vLLM: this one, or None."""
    spec = find_spec("vllm")
    return Path(sys.executable) if spec is not None and spec.origin is not None else None


def ask_vllm(
    python: Path,
    folder: Path,
    prompts: Sequence[list[int]],
    new: Sequence[int],
    *,
    trust: bool,
    dtype: str = "float32",
    length: int = 512,
    backend: str = "CPU_MLA",
) -> tuple[dict[str, Any], str]:
    """Returns what run_vllm.py answers, and vLLM's log; ``backend``: the attention of vLLM that runs it.

    Raises:
        VllmError: vLLM did not start, or broke off.
        VllmUnsuitedError: it is not for CPUs.
    """
    own = python == Path(sys.executable)
    command = [python, "-P" if own else "-I", SCRIPT]  # the script's folder, and another Python's paths, stay out
    job = {"model": str(folder), "dtype": dtype, "trust": trust, "length": length}
    job |= {"prompts": list(prompts), "new": list(new), "backend": backend}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise VllmError(f"no answer within {LIMIT} s") from late
    log, found, answer = done.stdout.rpartition(MARKER)
    if done.returncode or not found:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = [line for line in lines if ERROR.match(line)] or lines or [f"exit code {done.returncode}"]
        error = VllmError(f"{said[-1]:.160}")
        error.add_note(done.stdout[-3000:])
        raise error
    said = json.loads(answer.splitlines()[0])
    if (reason := said.get("unsuited")) is not None:
        raise VllmUnsuitedError(reason)
    return said, log


def check_in_vllm(checked: Parity, converted: Path, folder: Path, *, trust: bool) -> Parity:
    """Compares a folder with the converted model in vLLM, where that is installed and has a kernel for it.

    Args:
        checked: what transformers found. Where vLLM does not run, this is returned, and says why.
        converted: what ``anymla convert`` wrote.
        folder: the export.
        trust: whether vLLM is to run the folder's code.

    Raises:
        ParityError: log probabilities or tokens differ by more than the tolerance; says by how much.
    """
    if (python := vllm_python()) is None:
        return checked
    config = read_object(folder / "config.json")
    if any(config[name] != size for name, size in CPU_SIZES.items()):
        return replace(checked, not_run="vLLM was not run: on CPUs it runs --pad cpu only")

    def answers(prompts: list[Tensor], expected: list[Tensor]) -> Answers:
        return _answers(python, folder, prompts, expected, trust)

    try:
        return compare(converted, "vLLM", TOLERANCE[config["dtype"]], answers, cached=planned_numbers(folder))
    except VllmUnsuitedError as error:
        return replace(checked, not_run=f"vLLM was not run: {error}")
    except VllmError as error:
        return replace(checked, engine_failed=f"vLLM is installed but failed: {error}")


def _answers(python: Path, folder: Path, prompts: list[Tensor], expected: list[Tensor], trust: bool) -> Answers:
    """Prompts to continue and sequences to score, in one batch: vLLM starts once."""
    import torch

    asked = [ids[0].tolist() for ids in (*prompts, *expected)]
    new = [new_tokens(prompts, expected)] * len(prompts) + [1] * len(expected)
    length = max(ids.shape[1] for ids in expected) + 1
    found, _ = ask_vllm(python, folder, asked, new, trust=trust, length=length)
    return Answers(
        compared=LOG_PROBABILITIES,
        scores=[torch.tensor(own, dtype=torch.float64) for own in found["prompt_logprobs"][len(prompts) :]],
        sequences=[
            torch.cat([ids, torch.tensor([own])], dim=1) for ids, own in zip(prompts, found["tokens"], strict=False)
        ],
        cached_numbers=found["cache_bytes_per_token"] / 4 / found["layers"],
        version=found["version"],
    )

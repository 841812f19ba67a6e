"""llama.cpp in its own environment, as the tests call it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENT = Path(os.environ.get("ANYMLA_ENGINES") or CACHE / "anymla-engines") / "llama"
PYTHON = ENVIRONMENT / "bin" / "python"
MISSING = not any(ENVIRONMENT.glob("made-*"))


def run(file: Path, prompts: list[list[int]] = (), **request: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What run_llama.py answers, and the logits of every prompt [T,V]."""
    logits = file.with_suffix(".npz")
    request |= {"model": str(file), "prompts": prompts, "logits": str(logits)}
    done = subprocess.run(
        [PYTHON, "-I", HERE / "run_llama.py"],  # -I: neither PYTHONPATH nor this folder
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    arrays = np.load(logits) if prompts else {}
    return json.loads(done.stdout), [arrays[f"arr_{number}"] for number in range(len(prompts))]


@torch.no_grad()
def reference(model: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """The same from transformers in float32: greedy tokens of each prompt, and its logits [T,V]."""
    tokens, logits = [], []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(ids[0, len(prompt) :].tolist())
        logits.append(model(ids[:, :-1]).logits[0].numpy())
    return tokens, logits

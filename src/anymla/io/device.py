"""What this machine has: devices, memory, versions of what results depend on."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from anymla.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def pick_device(device: str) -> str:
    """The torch device that ``device`` names; ``auto`` is a GPU where there is one.

    Raises:
        RecipeError: torch does not know it or this machine does not have it.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend of torch has errors of its own
        raise RecipeError(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]:.160}") from error
    return device


def matmul_speed(device: str = "cpu") -> float:
    """Operations per second of a float32 product of matrices, measured in some milliseconds.

    The processor is measured with numpy, so that a plan needs no torch.
    """
    import numpy as np

    size, seconds = (1024, []) if device == "cpu" else (4096, [])
    matrix: Any = np.ones((size, size), dtype=np.float32)
    if device != "cpu":
        import torch

        matrix = torch.from_numpy(matrix).to(device)
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # asking for a number waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 3 * 2 * size**3 / sum(seconds[1:])  # the first one warms up


def copied_to(device: str, tensor: Tensor) -> Tensor:
    """A CPU ``tensor`` on ``device``. To CUDA it goes through pinned memory, so that the CPU need not wait for it."""
    if not device.startswith("cuda"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def machine_memory() -> int:
    """Bytes of memory in this machine."""
    return int(psutil.virtual_memory().total)


def give_back_memory() -> None:
    """Hands freed memory back to the system, where the C library (glibc) would keep it in pieces."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def versions(*others: str) -> dict[str, str]:
    """The versions of Python, anymla, torch, transformers and ``others``, packages by name."""
    packages = {name: version(name) for name in ("anymla", "torch", "transformers", *others)}
    return packages | {"python": platform.python_version()}


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    with suppress(OSError):  # Linux; getrusage there begins with what the parent process held
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024

"""The C kernels, compiled when they are first used and kept in the user's cache folder.

One of the modelling files that travel with every converted checkpoint. c_kernels.py, c_attention.py and c_encoding.py
have the source.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from .c_attention import ATTENTION
from .c_encoding import ENCODING
from .c_kernels import READING

SOURCE = READING + ATTENTION + ENCODING
SWITCH = "ANYMLA_C_KERNELS"  # "0" in the environment: torch does
TILE = 128  # tokens that C reads at a time: whole vectors of bytes, and of numbers by two
LANES = 8  # numbers of a vector
FLAGS = ("-O3", "-shared", "-fPIC", "-fopenmp", f"-DTILE={TILE}", f"-DLANES={LANES}")
NO_CALLS = "-fno-tree-loop-distribute-patterns"  # a call to clear 512 bytes takes longer than clearing them
OF_CPU = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx2", "-mfma")}  # wider vectors were slower
LONGEST = 120  # seconds that compiling may take


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where torch does: without a C compiler, or where the user says so."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform == "win32" or os.environ.get(SWITCH) == "0":
        return None
    command = [compiler, *FLAGS, NO_CALLS, *OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ())]
    name = hashlib.sha256("\n".join((platform.machine(), *command, SOURCE)).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anymla" / "kernels"
        if not (made := folder / f"{name}.so").exists():
            _compile(command, made)
        found = ctypes.CDLL(str(made))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, not writable, no such flags
        return None
    integer, address = ctypes.c_int64, ctypes.c_void_p
    found.anymla_attend.argtypes = [address, address, integer, *[address] * 3, *[integer] * 3]
    found.anymla_encode.argtypes = [address, address, address, address, integer, integer]
    found.anymla_attend.restype = found.anymla_encode.restype = None
    return found


def loaded() -> ctypes.CDLL:
    """The same, where they are known to be there.

    Raises:
        RuntimeError: they are not.
    """
    if (found := library()) is None:
        raise RuntimeError("attention over codes in C: there is no C compiler")
    return found


def _compile(command: list[str], made: Path) -> None:
    """Compiles to the file ``made``, which is whole from its first moment on."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        source, target = Path(folder) / "codes.c", Path(folder) / "codes.so"
        source.write_text(SOURCE)
        subprocess.run([*command, str(source), "-o", str(target)], check=True, capture_output=True, timeout=LONGEST)
        os.replace(target, made)

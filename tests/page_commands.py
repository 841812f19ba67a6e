"""Runs what pages say: `anymla` commands and Python, on the bundled model, with fewer tokens and steps."""

from __future__ import annotations

import functools
import shlex
import shutil
from pathlib import Path

import anymla
from tests.damage import BUNDLED, TRAIN, VALID, run_main

CALIBRATED = {"calibration_tokens": 512, "calibration_length": 64}
TRAINED = CALIBRATED | {"reconstruction_steps": 2}  # of the step mla
SHRUNK = {
    "tune": "--tokens 256 --length 64 --eval-tokens 256 --learning-rate 0.001",
    "compare": "--tokens 256 --length 64",
    "eval": "--tokens 256 --length 64 --limit 1",
    "generate": "--max-new-tokens 4",
    "chat": "--max-new-tokens 4",
    "run": "--overwrite",
}
OF_STEPS = {
    "mla": TRAINED,
    "tune": {"tokens": 256, "length": 64, "eval_tokens": 256, "learning_rate": 0.001},
    "transform_coding": CALIBRATED,
    "kvquant": CALIBRATED,
    "rounding": CALIBRATED,  # of docs/howto/write-a-method.md
}
OF_MLA = {"none", "--target", "--exact-window", "--recipe", "--plan"}  # words of a conversion that is the step mla


def make_folder(folder: Path) -> Path:
    """Puts into ``folder`` what the pages name: a model, and texts."""
    for name in ("MODEL", "BASE"):
        shutil.copytree(BUNDLED, folder / name)
    shutil.copy(TRAIN, folder / "my-text.txt")
    shutil.copy(VALID, folder / "held-out.txt")
    lines = [f'{{"text": "Once upon a time there was cat number {number} on a mat."}}' for number in range(400)]
    (folder / "my-text.jsonl").write_text("\n".join(lines))
    return folder


def anymla_commands(block: str) -> list[list[str]]:
    """The words of every `anymla` command in a block of shell."""
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words for words in lines if words[:1] == ["anymla"]]


def run_commands(commands: list[list[str]], monkeypatch, capfd) -> int:
    """Runs commands in order, as they stand there and with fewer tokens; returns how many."""
    for words in commands:
        done = run_main([*words[1:], *shrunk(words)], monkeypatch, capfd)
        assert done.code == 0, f"{shlex.join(words)}\n{done.err}"
        assert done.out, shlex.join(words)
    return len(commands)


def shrunk(words: list[str]) -> list[str]:
    """Options that make a command quick."""
    if words[1] == "convert":
        return ["--overwrite", *options_of(TRAINED if OF_MLA & {*words} else CALIBRATED)]
    if "--curve" in words:
        return options_of(CALIBRATED)
    return [*SHRUNK.get(words[1], "").split(), *shrunk_steps(words)]


def options_of(settings: dict[str, int]) -> list[str]:
    """The options of settings, with their values."""
    return [word for name, value in settings.items() for word in (option(name), str(value))]


def option(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def shrunk_steps(words: list[str]) -> list[str]:
    """Options of `anymla run` that make its steps quick; a recipe of a file has mla and tune."""
    if words[1] != "run":
        return []
    steps = [words[place + 1].partition(":")[0] for place, word in enumerate(words) if word == "--step"]
    changes = {f"{step}.{name}": value for step in steps or ["mla", "tune"] for name, value in OF_STEPS[step].items()}
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def run_python(blocks: list[str], monkeypatch) -> dict[str, object]:
    """Runs blocks of Python, one after the other, with the settings of a quick conversion; returns all names."""
    monkeypatch.setattr(
        anymla, "convert", functools.partial(anymla.convert, **CALIBRATED, overwrite=True), raising=False
    )
    monkeypatch.setattr(anymla, "evaluate", functools.partial(anymla.evaluate, tokens=256, length=64), raising=False)
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    return names

"""Commands of the README and of pages that it leads to run on the bundled model, with fewer tokens and steps."""

from __future__ import annotations

import functools
import io
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import anymla
from tests.damage import BUNDLED, TRAIN, VALID, run_main
from tests.gguf_files import write_gguf_model
from tests.markdown import ROOT, blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's doing
README = ROOT / "README.md"
SHELL = [text for language, text in blocks(README) if language == "sh"]
USE, STEPS = (next(block for block in SHELL if command in block) for command in ("anymla chat", "anymla methods"))
PYTHON = [text for language, text in blocks(README) if language == "python"]
SMALL = {"calibration_tokens": 2048, "calibration_length": 64, "reconstruction_steps": 2}
SHRUNK = {
    "convert": "--calibration-tokens 2048 --calibration-length 64 --reconstruction-steps 2 --overwrite",
    "tune": "--tokens 256 --length 64 --eval-tokens 256",
    "eval": "--tokens 256 --length 64 --limit 1",
    "generate": "--max-new-tokens 4",
    "chat": "--max-new-tokens 4",
    "run": "--overwrite",
}
OF_STEPS = {
    "mla": {"calibration_tokens": 2048, "calibration_length": 64, "reconstruction_steps": 2},
    "tune": {"tokens": 256, "length": 64, "eval_tokens": 256},
    "transform_coding": {"calibration_tokens": 2048, "calibration_length": 64},
    "kvquant": {"calibration_tokens": 2048, "calibration_length": 64},
}
FROM_THE_HUB = "Qwen/"  # tests have no network: tests/test_docs.py parses these


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the README's names are: a model, an adapter, a GGUF file, texts."""
    for name in ("MODEL", "BASE"):
        shutil.copytree(BUNDLED, tmp_path / name)
    shutil.copy(TRAIN, tmp_path / "my-text.txt")
    shutil.copy(VALID, tmp_path / "held-out.txt")
    lines = [f'{{"text": "Once upon a time there was cat number {number} on a mat."}}' for number in range(400)]
    (tmp_path / "my-text.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_sources(folder: Path) -> None:
    """What the block on sources reads."""
    write_gguf_model(folder / "model.gguf", GGMLQuantizationType.F32)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "ADAPTER")


def run(block, monkeypatch, capfd):
    """Runs every `anymla` command of ``block`` in order, as it stands there and with fewer tokens."""
    ran = 0
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["anymla"] or any(word.startswith(FROM_THE_HUB) for word in words):
            continue
        done = run_main([*words[1:], *SHRUNK.get(words[1], "").split(), *shrunk_steps(words)], monkeypatch, capfd)
        assert done.code == 0, f"{line}\n{done.err}"
        assert done.out, line
        ran += 1
    return ran


def shrunk_steps(words):
    """Options of `anymla run` that make its steps quick; a recipe of a file has mla and tune."""
    if words[1] != "run":
        return []
    steps = [words[place + 1].partition(":")[0] for place, word in enumerate(words) if word == "--step"]
    changes = {f"{step}.{name}": value for step in steps or ["mla", "tune"] for name, value in OF_STEPS[step].items()}
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def run_python(monkeypatch):
    """Runs the blocks of Python, one after the other, with the settings of a quick conversion; returns all names."""
    monkeypatch.setattr(anymla, "convert", functools.partial(anymla.convert, **SMALL, overwrite=True), raising=False)
    monkeypatch.setattr(anymla, "evaluate", functools.partial(anymla.evaluate, tokens=256, length=64), raising=False)
    names: dict[str, object] = {}
    exec("\n".join(PYTHON), names)
    return names


def first_block(page: str) -> str:
    """The commands that a page of docs/ begins with."""
    return next(text for language, text in blocks(ROOT / "docs" / page) if language in ("", "sh"))


def test_your_own_model_and_what_loads_it(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
    assert run(USE, monkeypatch, capfd) == 4
    names = run_python(monkeypatch)
    assert names["model"].config.model_type == "anymla_llama" and names["tokenizer"]("Once")["input_ids"]
    assert names["report"].output.name == "OUT" and names["scores"].perplexity > 1


def test_steps(folder, monkeypatch, capfd):
    shutil.copytree(ROOT / "examples", folder / "examples")
    assert run(STEPS, monkeypatch, capfd) == 4


def test_sources(folder, monkeypatch, capfd):
    add_sources(folder)
    assert run(first_block("sources.md"), monkeypatch, capfd) == 2


@pytest.mark.parametrize("page", ["exporting.md", "tuning.md"])
def test_pages_of_steps_that_follow(page, folder, monkeypatch, capfd):
    assert run(first_block(page), monkeypatch, capfd) == 3


def test_no_block_is_left_out():
    assert len(PYTHON) == 2
    ran = [line for block in (USE, STEPS) for line in block.splitlines()]
    assert [line for block in SHELL for line in block.splitlines() if line.startswith("anymla ")] == ran


def test_targets_of_make_and_extras_exist():
    text = "\n".join(SHELL)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) == {"demo", "test"} <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= extras.keys()

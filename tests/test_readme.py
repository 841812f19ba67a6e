"""Commands of the README and of pages that it leads to run on the bundled model, with fewer tokens and steps."""

from __future__ import annotations

import io
import re
import sys
import tomllib
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.damage import BUNDLED
from tests.gguf_files import write_gguf_model
from tests.markdown import ROOT, blocks
from tests.page_commands import anymla_commands, make_folder, run_commands, run_python

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's doing
README, RECIPES = ROOT / "README.md", ROOT / "examples" / "README.md"
SHELL = [text for language, text in blocks(README) if language == "sh"]
USE = next(block for block in SHELL if "anymla chat" in block)
STEPS = next(text for _, text in blocks(RECIPES) if "anymla methods kvquant" in text)
PYTHON = [text for language, text in blocks(README) if language == "python"]
FROM_THE_HUB = "Qwen/"  # tests have no network: tests/test_docs.py parses these


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the README's names are: a model, an adapter, a GGUF file, texts."""
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path)


def add_sources(folder: Path) -> None:
    """What the block on sources reads."""
    write_gguf_model(folder / "model.gguf", GGMLQuantizationType.F32)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "ADAPTER")


def run(block, monkeypatch, capfd):
    """Runs every command of ``block`` that needs no hub."""
    own = [words for words in anymla_commands(block) if not any(word.startswith(FROM_THE_HUB) for word in words)]
    return run_commands(own, monkeypatch, capfd)


def first_block(page: str) -> str:
    """The commands that a page of docs/ begins with."""
    return next(text for language, text in blocks(ROOT / "docs" / page) if language in ("", "sh"))


def test_your_own_model_and_what_loads_it(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
    assert run(USE, monkeypatch, capfd) == 4
    names = run_python(PYTHON, monkeypatch)
    assert names["model"].config.model_type == "anymla_llama" and names["tokenizer"]("Once")["input_ids"]


def test_steps(folder, monkeypatch, capfd):
    assert run(STEPS, monkeypatch, capfd) == 4


def test_sources(folder, monkeypatch, capfd):
    add_sources(folder)
    assert run(first_block("sources.md"), monkeypatch, capfd) == 2


@pytest.mark.parametrize("page", ["exporting.md", "tuning.md"])
def test_pages_of_steps_that_follow(page, folder, monkeypatch, capfd):
    assert run(first_block(page), monkeypatch, capfd) == 3


def test_no_block_is_left_out():
    assert len(PYTHON) == 1
    ran = [line for line in USE.splitlines() if line.startswith("anymla ")]
    assert [line for block in SHELL for line in block.splitlines() if line.startswith("anymla ")] == ran


def test_targets_of_make_and_extras_exist():
    text = "\n".join(SHELL)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) == {"demo", "test"} <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= extras.keys()

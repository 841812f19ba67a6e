"""The pages that exist for the site: their commands and their Python run, and all else that they name exists."""

from __future__ import annotations

import gc
import io
import re
import shlex
import sys
import tomllib

import pytest
import yaml

import anymla
import anymla.methods
from tests.markdown import ROOT, blocks
from tests.page_commands import anymla_commands, make_folder, run_commands, run_python

DOCS = ROOT / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md")), DOCS / "reference" / "platforms.md"]
METHOD = DOCS / "howto" / "write-a-method.md"
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # tests have no network
OTHERS = {"curl", "llama-server", "make", "pip", "transformers", "vllm"}  # tests/engines has the servers
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def of(page, language):
    """The page's blocks of a language."""
    return [text.replace(ON_THE_HUB, "MODEL") for found, text in blocks(page) if found == language]


@pytest.fixture
def rounding(tmp_path):
    """The method that a page shows, as the file that it says."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "rounding.py").write_text(of(METHOD, "python")[0], encoding="utf-8")
    anymla.methods.__path__.append(str(tmp_path / "plugins"))
    yield
    anymla.methods.__path__.remove(str(tmp_path / "plugins"))
    sys.modules.pop("anymla.methods.rounding", None)
    vars(anymla.methods).pop("rounding", None)
    gc.collect()  # a class is known for as long as it lives


@each_page
def test_commands_and_python_run(page, rounding, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(make_folder(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    commands = [words for block in of(page, "sh") for words in anymla_commands(block)]
    assert run_commands(commands, monkeypatch, capfd) == len(commands)
    if page != METHOD:
        run_python(of(page, "python"), monkeypatch)


@each_page
def test_other_commands_are_known(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in of(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert not words or words[0] in OTHERS | {"anymla"}, line
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets, line
            for names in re.findall(r"(?:\.|anymla)\[([\w,]+)\]", line):
                assert set(names.split(",")) <= extras.keys(), line


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Reads the tags that mkdocs reads."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.load(text, Loader)["nav"])))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= listed


def test_every_extra_is_on_the_page_of_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (DOCS / "reference" / "platforms.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"`{name}`" not in page] == []

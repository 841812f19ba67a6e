"""The pages: links and named files exist, commands have options that exist, the files of the forge load."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
import yaml

from anymla.cli import command_line
from tests.markdown import PAGES, ROOT, anchors, commands, links, paths, undefined
from tests.prose import complaints

HOMES = (ROOT, ROOT / "src" / "anymla", ROOT / "benchmarks")
FORGE = ROOT / ".github"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert not undefined(page), "names in brackets without a definition"
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    absent = {name for name in paths(page) if not any((home / name).exists() for home in (*HOMES, page.parent))}
    assert not absent


def parse(words):
    """Parses a command as the command line does, without running it."""
    command, context = command_line(), None
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("anymla", list(words), resilient_parsing=False)
    return context.params


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page) if "..." not in words]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name}-{' '.join(words)}" for name, words in COMMANDS])
def test_commands_have_options_that_exist(page, words):
    parse(words)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="--kv-cash"):
        parse(["convert", "MODEL", "-o", "OUT", "--kv-cash", "0.25"])


def test_prose_linter_reads_sentences_and_words():
    long = "One " + "word " * 25 + "more."
    text = f"""# Title

A short one. {long}

| cell | `behind` $behind$ |
|---|---|
| It comes behind that | a [link behind](page.md) |

```
behind {long}
```
"""
    found = list(complaints(text))
    assert [line for line, _ in found] == [3, 7, 7]
    assert found[0][1].startswith("27 words") and all("write after" in message for _, message in found[1:])


@pytest.mark.parametrize("file", sorted(FORGE.rglob("*.yml")), ids=lambda file: file.name)
def test_files_of_the_forge_load(file):
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.parent.name == "ISSUE_TEMPLATE" and file.name != "config.yml":
        assert content.keys() >= {"name", "description", "body"}
        names = [part["id"] for part in content["body"] if part["type"] != "markdown"]
        assert len(names) == len(set(names))
    if file.parent.name == "workflows":
        assert {"name", True, "permissions", "jobs"} <= content.keys()  # YAML reads the key `on` as true
        assert all(job["runs-on"] and job["steps"] for job in content["jobs"].values())


def test_ci_runs_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = yaml.safe_load((FORGE / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    used = {*matrix["target"], *(row["target"] for row in matrix["include"])}
    for job in jobs.values():
        for step in job["steps"]:
            words = step.get("run", "").replace("${{ matrix.target }}", "").split()
            used |= {word for word in words[1:] if "=" not in word} if words[:1] == ["make"] else set()
    assert used == {"lint", "types", "imports", "pytest", "oldest", "newest", "demo", "docs", "wheel"}
    assert used <= targets

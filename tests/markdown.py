"""What the project's pages contain: links, headings, paths, blocks of code, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("examples/*.md"),
    )
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The text of ``page`` without blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of links and pictures, inline and by reference."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE)


def undefined(page: Path) -> set[str]:
    """Names of links by reference, and names in brackets that look like a file's, that have no definition."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    defined = set(re.findall(r"^\[([^\]]+)\]:", text, re.MULTILINE))
    return {*re.findall(r"\]\[([^\]]+)\]", text), *re.findall(r"\[([\w./-]+\.(?:py|md))\](?![(:])", text)} - defined


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of ``page``, as the forge makes them."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+\s+(.+?)\s*$", prose(page), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, most in found.items() for number in range(most + 1)}


def paths(page: Path) -> set[str]:
    """Paths of the project's own files, folders included, that stand in backticks."""
    code = re.findall(r"`([\w.-]+/[\w./-]*)`", prose(page))
    return {path for path in code if path.endswith("/") or Path(path).suffix in {".py", ".md", ".toml", ".sh", ".yml"}}


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `anymla` command in the blocks of shell, in order."""
    found = []
    for language, text in blocks(page):
        if language in ("", "sh"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "anymla" in words and words[0] in ("anymla", "torchrun", "accelerate"):
                    found.append(words[words.index("anymla") + 1 :])
    return found

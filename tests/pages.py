"""What every page must keep to: one file without a network, drawings that say what they show, all figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
LOADS = {"src", "srcset", "data", "poster", "action", "background"}  # attributes that make a browser fetch something
VOID = {"meta", "br", "circle", "rect", "path"}


class Parsed(HTMLParser):
    """A page's text, its tags with their attributes, and which are open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def check_page(path: Path, content: dict[str, Any]) -> Parsed:
    """Holds the page at ``path`` to all of this; ``content``: what the JSON file beside it holds."""
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.open == [], "a tag is not closed"
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if LOADS & attributes.keys()]
    assert "@import" not in text and "url(" not in text
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "a":
            assert re.match(r"https://arxiv\.org/abs/\d{4}\.\d{5}$", attributes["href"] or "")
    held = set(NUMBER.findall(" ".join(page.text)))
    assert not {figure for figure in figures(content) if figure not in held}
    return page


def figures(content: Any) -> Iterator[str]:
    """Every number in ``content``, as JSON writes it."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for each in content:
            yield from figures(each)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield json.dumps(content)

"""The prose linter: long sentences, and words that tests/prose.yaml advises against, in the project's pages.

python -m tests.prose

vale and proselint do not serve here: vale's package fetches its program when it first runs, and proselint has no rule
for the length of sentences and takes no rules of one's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.markdown import PAGES, ROOT

RULES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
AVOID = [(re.compile(rule["pattern"], re.IGNORECASE), rule["write"]) for rule in RULES["avoid"]]
END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<=[.!?])[)\"'*]*\s+")
FORMULA = re.compile(r"(\$\$.+?\$\$|\$[^$\n]+(?:\n[^$\n]+)?\$)", re.DOTALL)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every sentence of a Markdown page; code and a formula count as the one word `Code`."""
    text = FORMULA.sub(lambda formula: "`F" + "\n" * formula[0].count("\n") + "`", text)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline" and token.map:
            plain = _plain(token)
            for sentence in END.split(plain):
                yield token.map[0] + 1, " ".join(sentence.split())


def _plain(token: Token) -> str:
    """The words of an inline token, with the text of links and without pictures."""
    known = {"text": lambda part: part.content, "code_inline": lambda _: "Code", "softbreak": lambda _: " "}
    return "".join(known[part.type](part) for part in token.children or [] if part.type in known)


def complaints(text: str) -> Iterator[tuple[int, str]]:
    """Line and message of everything in ``text`` that breaks a rule."""
    for line, sentence in sentences(text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > RULES["most_words"]:
            yield line, f"{len(words)} words in one sentence, at most {RULES['most_words']}: {sentence[:60]}..."
        for pattern, instead in AVOID:
            if found := pattern.search(sentence):
                yield line, f"'{found[0].strip()}': write {instead}: ...{sentence[max(0, found.start() - 30) :][:80]}"


def main() -> int:
    """Prints what breaks a rule, a line each; 1 if anything does."""
    wrong = 0
    for page in PAGES:
        for line, message in complaints(page.read_text(encoding="utf-8")):
            sys.stdout.write(f"{page.relative_to(ROOT)}:{line}: {message}\n")
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

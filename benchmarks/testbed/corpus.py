"""Text of several domains, from .jsonl, .jsonl.xz or text files."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable
from pathlib import Path

from anymla.data.text import DOCUMENT_SEPARATOR

SAMPLE_CHARACTERS = 8 << 20  # of a large text, drawn from all of it


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(domain, text) of every document; the domain is the field of that name, or empty."""
    content = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text("utf-8-sig")
    if ".jsonl" in path.suffixes:
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        return [(row.get("domain", ""), row["text"].strip()) for row in rows]
    return [("", text.strip()) for text in content.split(DOCUMENT_SEPARATOR) if text.strip()]


def documents(paths: Iterable[Path], domain: str = "") -> list[str]:
    """The documents of all files, of one domain where one is named."""
    return [text for path in paths for kind, text in read_rows(path) if not domain or kind == domain]


def domains(paths: Iterable[Path]) -> list[str]:
    """The domains of all files' documents; none where these name none."""
    return sorted({domain for path in paths for domain, _ in read_rows(path)} - {""})


def sample(paths: Iterable[Path], target: Path, domain: str = "", piece: int | None = None) -> str:
    """Writes documents, or pieces of ``piece`` characters of them, in random order; returns the jsonl file's name."""
    texts, size = documents(paths, domain), 0
    if piece is not None:
        texts = [text[start : start + piece] for text in texts for start in range(0, len(text), piece)]
    random.Random(0).shuffle(texts)
    with target.open("w") as file:
        for text in texts:
            if size < SAMPLE_CHARACTERS:
                print(json.dumps({"text": text}), file=file)
            size += len(text)
    return str(target)

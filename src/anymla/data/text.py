"""Text in, token windows out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.errors import TextError

DOCUMENT_SEPARATOR = "<|endoftext|>"
BETWEEN_PIECES = "\n\n"  # of long documents, in calibration windows
PIECE_CHARACTERS = 2048  # a long document is drawn from in pieces of so many, or of about a window if that is more
MINIMUM_TOKENS = 256
SUFFIXES = (".txt", ".jsonl", ".json")  # of files, which no hub data set has
WINDOWS_AT_LEAST = 8  # of calibration text: to fit on, to choose on, to report on
DATASET_DOCUMENTS = 4096
RANDOM_TOKENS = 256  # of a window: enough to tell how fast rope turns, and what keys are


def random_windows(vocabulary: int, longest: int) -> Tensor:
    """Windows [N,T] of random tokens, of at most ``longest``: what a method without text shows to layers."""
    shape = (WINDOWS_AT_LEAST, min(RANDOM_TOKENS, longest))
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def bundled_text(split: str) -> Path:
    """The TinyStories sample shipped in the package; split is 'train' or 'valid'."""
    return Path(str(resources.files("anymla") / "assets" / f"tinystories-{split}.txt"))


def is_local(source: str | Path) -> bool:
    """Returns whether ``source`` is a file or a folder: it exists, or no hub data set has such a name."""
    path, text = Path(os.path.expanduser(source)), str(source)
    local = path.suffix in SUFFIXES or path.is_absolute() or text.startswith((".", "~"))
    return local or text.partition(":")[0].count("/") > 1 or path.exists()


def check_texts(named: Mapping[str, str | Path | None]) -> None:
    """Finds texts readable before hours of work need them. Of a hub data set it reads the first row.

    ``named``: each text by the option that names it; None where it names none.

    Raises:
        TextError: a text is missing, unreadable or empty; the message begins with the option.
    """
    for option, source in named.items():
        if source is None:
            continue
        try:
            read_documents(source) if is_local(source) else _read_dataset(str(source), 1)
        except TextError as error:
            raise TextError(f"{option}: {error}") from error


def read_documents(source: str | Path) -> list[str]:
    """Documents of a text file, a .jsonl file (field ``text``) or a hub data set ``name[:config[:split]]``.

    In a text file, lines ``<|endoftext|>`` separate documents; without them the file is one document.

    Raises:
        TextError: the source is missing, unreadable, or holds no text.
    """
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves users nobody knows
    if path.is_file():
        documents = _read_file(path)
    elif is_local(source):
        raise TextError(f"text {source} is not a readable file")
    else:
        documents = _read_dataset(str(source), DATASET_DOCUMENTS)
    documents = [document for document in (text.strip() for text in documents) if document]
    if not documents:
        raise TextError(f"text {source} is empty")
    return documents


def _read_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [text for (text,) in read_rows(content, f"text {path}", "text")]
    except UnicodeDecodeError as error:
        raise TextError(f"text {path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise TextError(f"text {path} cannot be read: {error.strerror}") from error
    return content.split(DOCUMENT_SEPARATOR)


def read_rows(content: str, source: str, *fields: str) -> list[tuple[str, ...]]:
    """The strings under ``fields`` in each line of JSON of ``content``; ``source`` is how messages name it.

    Raises:
        TextError: a line is no JSON object, or a field is no string; names the line.
    """
    return [
        _row(line, f"{source}, line {number}", fields)
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]


def _row(line: str, where: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not JSON ({error})") from error
    for name in fields:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise TextError(f"{where}: must be a JSON object whose field {name!r} is a string")
        if any("\ud800" <= character <= "\udfff" for character in row[name]):
            raise TextError(f"{where}: field {name!r} holds half a character (a lone surrogate)")
    return tuple(row[name] for name in fields)


def _read_dataset(name: str, most: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(f"{name} is not a file; to read it as a hub data set: pip install 'anymla[data]'") from error
    dataset, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = load_dataset(dataset, config or None, split=split or "train", streaming=True)
        return [str(row["text"]) for row in islice(rows, most)]
    except Exception as error:  # whatever the hub, the network or the data set's own reader raises
        raise TextError(f"text {name} is neither a file nor a readable data set: {error!s:.200}") from error


def first_tokens(tokenizer: Any) -> list[int]:
    """The BOS token, with which text begins. Nothing if the tokenizer has none, or its config says not to add it."""
    refused = tokenizer.init_kwargs.get("add_bos_token") is False  # as its own config says; the attribute has a default
    return [] if refused or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def begun_rows(documents: Iterable[list[int]], length: int, begin: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of documents in a row, cut every ``length`` tokens, and the position of each in its document.

    ``begin`` is put before every document. What a cut leaves of one goes on as one of its own, after ``begin``, too.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        done = 0
        while done < len(document):
            room = length - len(ids) % length
            after = done + max(0, room - len(begin))
            piece = [*begin[:room], *document[done:after]]
            ids += piece
            positions += range(len(piece))
            done = after
    return ids, positions


def token_windows(
    documents: Iterable[list[int]],
    begin: Sequence[int],
    source: str | Path,
    *,
    length: int,
    tokens: int | None = None,
    at_least: int = 1,
) -> Tensor:
    """Windows [N, T] of the first ``tokens`` tokens of ``documents``; each begins with ``begin``.

    A model that expects a BOS token loses much without it, because its first token takes up attention that is not
    needed. T is ``length``, or less where the text gives less than ``at_least`` windows of it.

    Raises:
        TextError: fewer than 256 tokens, or windows so short that ``begin`` fills them; the message names ``source``.
    """
    documents = [document for document in documents if document]
    found = sum(len(document) + len(begin) for document in documents)
    total = found if tokens is None else min(found, tokens)
    if total < MINIMUM_TOKENS:
        raise TextError(f"text {source} gives {total} tokens; at least {MINIMUM_TOKENS} are needed")
    length = min(length, total // at_least)
    if length <= len(begin):
        raise TextError(f"text {source}: windows of {length} tokens hold no text after the {len(begin)} that begin one")
    count = total // length
    ids, _ = begun_rows(documents, length, begin)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def text_windows(
    documents: Iterable[str], tokenizer: Any, source: str | Path, *, length: int, tokens: int | None = None
) -> Tensor:
    """The same of texts, each begun by the BOS token; no more of them are tokenized than are needed."""
    begun = _documents(((True, document) for document in documents), tokenizer, tokens)
    return token_windows(begun, first_tokens(tokenizer), source, length=length, tokens=tokens)


def calibration_windows(source: str | Path, tokenizer: Any, *, tokens: int, length: int, seed: int) -> Tensor:
    """Windows [N, T] of about ``tokens`` tokens drawn from all over ``source``; the same seed draws the same.

    Long documents are drawn from in pieces of about a window, so that a sample has as many places as it has windows. A
    piece from inside a document follows the piece before it, with no BOS token between them.
    """
    size = max(PIECE_CHARACTERS, 4 * length)
    pieces = [
        (start == 0, document[start : start + size])
        for document in read_documents(source)
        for start in range(0, len(document), size)
    ]
    random.Random(seed).shuffle(pieces)
    found, begin = _documents(pieces, tokenizer, tokens), first_tokens(tokenizer)
    return token_windows(found, begin, source, length=length, tokens=tokens, at_least=WINDOWS_AT_LEAST)


def _documents(pieces: Iterable[tuple[bool, str]], tokenizer: Any, tokens: int | None) -> list[list[int]]:
    """Token ids of documents, ``tokens`` in all or a few more; of each piece of text, whether it begins one."""
    found: list[list[int]] = []
    count = 0
    for begins, text in pieces:
        if tokens is not None and count >= tokens:
            break
        ids = token_ids(text if begins else BETWEEN_PIECES + text, tokenizer)
        if begins or not found:
            found.append(ids)
        else:
            found[-1] += ids
        count += len(ids)
    return found

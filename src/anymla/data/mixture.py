"""Text to learn from: weighted mixtures of streams of documents, packed into rows of one length."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.data.text import (
    begun_rows,
    check_texts,
    first_tokens,
    is_local,
    read_documents,
    text_windows,
    token_ids,
    token_windows,
)
from anymla.errors import RecipeError, TextError

SHUFFLED = 1024  # documents of a stream among which the next one is drawn
SHUFFLED_TOKENS = 1 << 19  # in packed rows among which the next one is drawn: neighbours are mostly of one document
TOGETHER = 128  # documents packed at once: what fills no row at their end is left out


@dataclass(frozen=True)
class Source:
    """One part of a mixture: what ``--data`` names, and its share of the tokens."""

    name: str
    share: float

    @classmethod
    def of(cls, text: str) -> Source:
        """Reads ``name`` or ``name@share``.

        Raises:
            RecipeError: the share is not above 0.
        """
        name, at, share = text.rpartition("@")
        if not at or os.path.exists(os.path.expanduser(text)):
            return cls(text, 1.0)
        try:
            value = float(share)
        except ValueError:
            return cls(text, 1.0)
        if not 0 < value < float("inf") or not name:
            raise RecipeError(f"--data {text}: after the @ give a share above 0")
        return cls(name, value)

    @property
    def is_text(self) -> bool:
        """Returns whether anymla reads it itself; the datasets package reads folders and hub data sets."""
        return is_local(self.name) and not Path(os.path.expanduser(self.name)).is_dir()

    def documents(self, length: int) -> Any:
        """A stream of rows {'text': a document}, long ones in pieces that fill several rows of ``length`` tokens.

        Those of a local file come in random order, the same one each time: files are often sorted.
        """
        import datasets

        piece = max(16384, 8 * length)
        if self.is_text:
            documents = list(read_documents(self.name))
            random.Random(0).shuffle(documents)
            pieces = [
                document[start : start + piece] for document in documents for start in range(0, len(document), piece)
            ]
            return datasets.Dataset.from_dict({"text": pieces}).to_iterable_dataset()
        dataset, config, split = (*self.name.split(":"), "", "")[:3]
        try:
            rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
            if "text" not in (first := next(iter(rows))):
                raise TextError(f"--data {self.name}: its rows have {', '.join(first)} and no field 'text'")
        except TextError:
            raise
        except Exception as error:  # whatever the hub, the network or the data set's own reader raises
            reason = " ".join(str(error).split())
            raise TextError(f"--data {self.name} is neither a file nor a readable data set: {reason:.160}") from error
        return rows.select_columns(["text"])


@dataclass(frozen=True)
class Texts:
    """The mixture, and the text to score on: ``skipped`` documents of each source, which nothing is learned from."""

    sources: list[Source]
    held_out: Tensor  # windows [N,T]
    skipped: list[int]


def check_data(data: Sequence[str] | None, held_out: str | None) -> None:
    """Finds what tuning needs before hours of work do.

    Raises:
        RecipeError: no data was given, or the package datasets is not installed.
        TextError: a text cannot be read.
    """
    if find_spec("datasets") is None:
        raise RecipeError("tuning needs the package datasets: pip install 'anymla[tune]'")
    if data is None:
        raise RecipeError("--data is missing: name a text file, a .jsonl file or a hub data set to learn from")
    check_texts({"--eval-data": held_out})
    for source in map(Source.of, data):
        if not os.path.isdir(os.path.expanduser(source.name)):
            check_texts({"--data": source.name})


def read_texts(
    data: Sequence[str], tokenizer: Any, length: int, *, held_out: str | None, held_out_tokens: int
) -> Texts:
    """Opens every source of ``data``, and takes the text to score on from ``held_out``, or else from the sources.

    Raises:
        TextError: a source cannot be read, or leaves nothing to learn from.
    """
    sources = [Source.of(text) for text in data]
    if held_out is not None:
        texts = read_documents(held_out)
        windows = text_windows(texts, tokenizer, held_out, length=length, tokens=held_out_tokens)
        for source in sources:
            _take(source, tokenizer, 1, length)  # it can be read
        return Texts(sources, windows, [0] * len(sources))
    whole, begin = sum(source.share for source in sources), first_tokens(tokenizer)
    found: list[list[int]] = []
    skipped: list[int] = []
    for source in sources:
        wanted = max(1, round(held_out_tokens * source.share / whole))
        documents = _take(source, tokenizer, wanted, length)
        found += documents
        skipped.append(len(documents))
    windows = token_windows(found, begin, ", ".join(data), length=length)
    return Texts(sources, windows, skipped)


def _take(source: Source, tokenizer: Any, tokens: int, length: int) -> list[list[int]]:
    """The first documents, the last one cut, with ``tokens`` tokens in all; more must follow."""
    found: list[list[int]] = []
    count = 0
    for row in source.documents(length):
        if count >= tokens:
            return found
        ids = token_ids(row["text"], tokenizer)
        found.append(ids[: tokens - count])
        count += len(ids)
    raise TextError(
        f"--data {source.name} has only {count} tokens; the first documents are to score on, and others to learn "
        "from: lower --eval-tokens, or give --eval-data"
    )


def tokens_of_a_pass(texts: Texts, tokenizer: Any, length: int, most: int) -> int | None:
    """Tokens of the mixture until its first source begins anew; counts no more than ``most`` of a source.

    None where one of them is streamed: nobody knows its end.
    """
    if not all(source.is_text for source in texts.sources):
        return None
    whole, begin, passes = sum(source.share for source in texts.sources), first_tokens(tokenizer), []
    for source, skipped in zip(texts.sources, texts.skipped, strict=True):
        documents = source.documents(length).skip(skipped)
        ids = (token for row in documents for token in begin + token_ids(row["text"], tokenizer))
        passes.append(round(sum(1 for _ in islice(ids, most)) * whole / source.share))
    return min(passes)


def training_rows(texts: Texts, tokenizer: Any, *, length: int, packing: bool, seed: int) -> Any:
    """An endless stream of rows, each source's share of them drawn at random; the same seed draws the same.

    A packed row has 'input_ids' and 'position_ids', [length] each: positions begin anew with each document, and so
    transformers knows that none may see another. Without packing a row is one document, with an 'attention_mask'.
    """
    import datasets

    begin, rows_of = first_tokens(tokenizer), packed_rows if packing else padded_rows

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return rows_of([token_ids(text, tokenizer) for text in batch["text"]], length, begin)

    streams = [
        source.documents(length)
        .skip(skipped)
        .shuffle(seed=seed, buffer_size=SHUFFLED)
        .repeat(None)
        .map(pack, batched=True, batch_size=TOGETHER, remove_columns=["text"])
        .shuffle(seed=seed, buffer_size=max(1, SHUFFLED_TOKENS // length))
        for source, skipped in zip(texts.sources, texts.skipped, strict=True)
    ]
    if len(streams) == 1:
        return streams[0]
    whole = sum(source.share for source in texts.sources)
    shares = [source.share / whole for source in texts.sources]
    return datasets.interleave_datasets(streams, probabilities=shares, seed=seed)


def packed_rows(documents: list[list[int]], length: int, begin: Sequence[int]) -> dict[str, list[list[int]]]:
    """Documents in a row, cut every ``length`` tokens; each begins with ``begin``, and so does what a cut leaves."""
    ids, positions = begun_rows(documents, length, begin)
    rows = range(0, len(ids) - length + 1, length)
    return {
        "input_ids": [ids[row : row + length] for row in rows],
        "position_ids": [positions[row : row + length] for row in rows],
    }


def padded_rows(documents: list[list[int]], length: int, begin: Sequence[int]) -> dict[str, list[list[int]]]:
    """A row per ``length`` tokens of one document, each after ``begin``, the last one padded at its end."""
    size = length - len(begin)
    pieces = [
        [*begin, *document[start : start + size]] for document in documents for start in range(0, len(document), size)
    ]
    return {
        "input_ids": [piece + [0] * (length - len(piece)) for piece in pieces],
        "attention_mask": [[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces],
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows as tensors [B,T]."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

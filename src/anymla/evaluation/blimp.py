"""BLiMP from local files: which of two sentences that differ in one point of grammar a model finds likelier.

Warstadt et al. 2020, arXiv 1912.00582. A folder of its .jsonl files, or the .zip as it is distributed.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from anymla.data.text import first_tokens, read_rows
from anymla.errors import TextError
from anymla.evaluation.likelihood import Answer, Query, Questions
from anymla.evaluation.measures import Measure

MOST_BYTES = 1 << 26  # of one file; the largest of BLiMP has half a MiB
NAME, METRIC = "blimp", "accuracy"


@dataclass(frozen=True)
class Paradigm:
    """One file: pairs of a good and a bad sentence, and the field of grammar that it belongs to."""

    name: str
    field: str | None
    pairs: list[tuple[str, ...]]


def read_blimp(source: Path, limit: int | None) -> list[Paradigm]:
    """The paradigms of a folder or zip, by name, of each at most ``limit`` pairs.

    Raises:
        TextError: not readable, no .jsonl in it, two of one name, or a line that is no pair of sentences.
    """
    paradigms: dict[str, Paradigm] = {}
    for name, content in _files(source):
        stem, where = PurePosixPath(name).stem, f"--blimp {source}, {name}"
        if stem in paradigms:
            raise TextError(f"{where}: there are two files of this name")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(f"{where}: not UTF-8 (byte {error.start})") from error
        pairs = read_rows(text, where, "sentence_good", "sentence_bad")
        if not pairs:
            raise TextError(f"{where}: no pairs of sentences in it")
        field = json.loads(next(line for line in text.split("\n") if line.strip())).get("field")
        field = field.replace("/", "_") if isinstance(field, str) else None  # the original has syntax/semantics once
        paradigms[stem] = Paradigm(stem, field, pairs[:limit])
    if not paradigms:
        raise TextError(f"--blimp {source}: no .jsonl files in it")
    return [paradigms[name] for name in sorted(paradigms)]


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the .jsonl files; those of a zip are only read, never unpacked to a place that it names."""
    try:
        if source.is_dir():
            for path in sorted(source.glob("*.jsonl")):
                yield path.name, path.read_bytes()
            return
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                name = PurePosixPath(member.filename).name
                if not name.endswith(".jsonl") or name.startswith("."):  # macOS adds ._NAME.jsonl
                    continue
                if member.file_size > MOST_BYTES:
                    raise TextError(f"--blimp {source}, {member.filename}: more than {MOST_BYTES >> 20} MiB")
                yield member.filename, archive.read(member)
    except zipfile.BadZipFile as error:
        raise TextError(f"--blimp {source} must be a folder of .jsonl files or a .zip of them: {error}") from error
    except (OSError, RuntimeError, EOFError, zlib.error) as error:  # RuntimeError: encrypted, or of unknown method
        raise TextError(f"--blimp {source} cannot be read: {error}") from error


def blimp_questions(paradigms: list[Paradigm], tokenizer: Any) -> Questions:
    """Both sentences of each pair, whole.

    Raises:
        TextError: a sentence gives no tokens.
    """
    begin = first_tokens(tokenizer) or [token for token in [tokenizer.eos_token_id] if token is not None]
    sentences = [sentence for paradigm in paradigms for pair in paradigm.pairs for sentence in pair]
    queries = []
    tokens = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    for sentence, ids in zip(sentences, tokens, strict=True):
        if len(begin + ids) < 2:
            raise TextError(f"--blimp: the sentence {sentence!r:.80} gives too few tokens")
        queries.append(Query(begin + ids, 1))
    return Questions(queries, lambda found: _measures(paradigms, found))


def _measures(paradigms: list[Paradigm], found: list[Answer]) -> list[Measure]:
    """Accuracy over all pairs, per field and per paradigm. A tie counts as wrong."""
    sums = iter([float(answer.log_probs.sum()) for answer in found])
    outcomes = {paradigm.name: [float(next(sums) > next(sums)) for _ in paradigm.pairs] for paradigm in paradigms}
    fields: dict[str, list[float]] = defaultdict(list)
    for paradigm in paradigms:
        if paradigm.field is not None:
            fields[paradigm.field] += outcomes[paradigm.name]
    return [
        Measure.mean(NAME, METRIC, [outcome for each in outcomes.values() for outcome in each]),
        *(Measure.mean(f"{NAME} {field}", METRIC, fields[field]) for field in sorted(fields)),
        *(
            Measure.mean(each.name, METRIC, outcomes[each.name], part_of=f"{NAME} {each.field}" if each.field else NAME)
            for each in paradigms
        ),
    ]

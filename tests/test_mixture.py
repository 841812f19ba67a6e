"""Rows of text that tuning learns from: packed or padded, mixed by weight, in random order."""

import json
from itertools import pairwise

import torch

from anymla.data.mixture import Source, Texts, packed_rows, padded_rows, read_texts, training_rows
from anymla.io.checkpoint import load_tokenizer
from tests.damage import BUNDLED


def test_rows_are_cut_where_documents_and_rows_begin():
    rows = packed_rows([[5, 6], [7], [8, 9, 10]], 4, [1])
    assert rows["input_ids"] == [[1, 5, 6, 1], [1, 7, 1, 8]]  # what fills no row is left out
    assert rows["position_ids"] == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert packed_rows([[5, 6], [7, 8]], 2, []) == {"input_ids": [[5, 6], [7, 8]], "position_ids": [[0, 1], [0, 1]]}
    padded = padded_rows([[5, 6], [7, 8, 9, 10]], 4, [1])
    assert padded["input_ids"] == [[1, 5, 6, 0], [1, 7, 8, 9], [1, 10, 0, 0]]
    assert padded["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_what_a_cut_leaves_of_a_document_begins_as_every_document(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "abcd " * 4000}))
    texts = Texts([Source.of(str(tmp_path / "long.jsonl"))], torch.zeros(1, 1), [0])
    rows = training_rows(texts, load_tokenizer(BUNDLED), length=32, packing=True, seed=0)
    first = [(row["input_ids"][0], row["position_ids"][0]) for row, _ in zip(rows, range(50), strict=False)]
    assert set(first) == {(1, 0)}


def test_a_mixture_has_its_weights_in_tokens(tmp_path):
    for name, size in (("short", 20), ("long", 400)):
        lines = [json.dumps({"text": name[0] * size}) for _ in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(BUNDLED)
    sources = [Source.of(f"{tmp_path}/short.jsonl@3"), Source.of(f"{tmp_path}/long.jsonl@1")]
    texts = Texts(sources, torch.zeros(1, 1), [0, 0])
    rows = training_rows(texts, tokenizer, length=32, packing=True, seed=1)
    short = tokenizer("ssss", add_special_tokens=False)["input_ids"]
    kinds = [len(set(row["input_ids"]) & set(short)) > 0 for row, _ in zip(rows, range(400), strict=False)]
    assert 0.68 < sum(kinds) / len(kinds) < 0.82
    again = training_rows(texts, tokenizer, length=32, packing=True, seed=1)
    assert next(iter(again)) == next(iter(rows))


def test_what_is_scored_on_is_not_learned_from(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{'abcdefghij'[i]} " * 60}) for i in range(10)))
    tokenizer = load_tokenizer(BUNDLED)
    texts = read_texts([str(tmp_path / "a.jsonl")], tokenizer, 32, held_out=None, held_out_tokens=256)
    rows = training_rows(texts, tokenizer, length=32, packing=True, seed=0)
    learned = {token for row, _ in zip(rows, range(200), strict=False) for token in row["input_ids"]}
    kept_apart = set(texts.held_out.flatten().tolist()) - {1}
    assert texts.skipped[0] >= 2
    assert len(kept_apart - learned) >= 2


def test_rows_of_a_sorted_file_come_mixed(tmp_path):
    names = "abcdefgh"
    lines = [json.dumps({"text": f"{name} " * 700}) for name in names for _ in range(16)]
    (tmp_path / "sorted.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(BUNDLED)
    own = [set(tokenizer(f"{name} {name}", add_special_tokens=False)["input_ids"][-1:]) for name in names]

    def kinds(ids):
        return {number for number, tokens in enumerate(own) if tokens & set(ids)}

    texts = read_texts([str(tmp_path / "sorted.jsonl")], tokenizer, 64, held_out=None, held_out_tokens=8192)
    assert len(kinds(texts.held_out.flatten().tolist())) > 2  # in the file's order it would be one
    stream = training_rows(texts, tokenizer, length=64, packing=True, seed=0)
    rows = [kinds(row["input_ids"]) for row, _ in zip(stream, range(200), strict=False)]
    assert set.union(*rows[:50]) == set(range(len(names)))
    assert sum(bool(row & after) for row, after in pairwise(rows)) < 100  # neighbours: nearly all

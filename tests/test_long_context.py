"""The benchmark of long contexts: what is scored by position, the probe's context, and the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from anymla.demo import bundled_model
from anymla.evaluation.logits import Logits
from anymla.io.checkpoint import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import long_context
import long_context_page


def test_tokens_are_scored_one_by_one():
    ids = torch.tensor([[1, 0, 2]])
    logits, said = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    kl, loss = long_context.by_token(ids, Logits.of(logits), Logits.of(said))
    assert kl[0].isnan()
    assert loss[0].isnan()
    p, q = logits[0].log_softmax(-1), said[0].log_softmax(-1)
    torch.testing.assert_close(kl[1:], (q.exp() * (q - p)).sum(-1)[:2])
    torch.testing.assert_close(loss[1:], -torch.stack([p[0, 0], p[1, 2]]))


def test_rows_of_the_probe_come_again_at_the_end():
    tokenizer = load_tokenizer(bundled_model())
    filler = [tokenizer.bos_token_id, *(300 + place % 100 for place in range(511))]
    copy, *needles = long_context.probe_queries(tokenizer, filler, 512)
    asked = copy.ids[copy.start :]
    rows = [list(asked[at : at + 16]) for at in range(0, len(asked), 16)]
    planted = [at for row in rows for at in range(copy.start) if list(copy.ids[at : at + 16]) == row]
    assert len(rows) == len(planted) == 8
    assert planted == sorted(planted)
    assert len(copy.ids) <= 1 + 512  # the first token, and so many
    assert all(len(needle.ids) == 512 for needle in needles)
    assert needles[0].ids != needles[1].ids


def bucket(start, kl, short):
    return {"start": start, "kl": kl, "loss": 1.0, "short_kl": short}


def test_page_says_where_a_long_context_loses_more(tmp_path):
    protocol, used = {"held_out": "h", "length": 1024, "probe": 64}, {"text": "t", "tokens": 2048, "length": 512}
    known = {"model": "tiny", "protocol": protocol, "share": 0.125, "copy": 0.5, "needle": 0.25, "layers": "all"}
    original = known | {"case": "original", "calibration": None}
    rows = [
        original | {"buckets": [bucket(0, 0.0, 0.0), bucket(512, 0.0, 0.0)]},
        known | {"case": "a", "calibration": used, "buckets": [bucket(0, 0.1, 0.1), bucket(512, 0.13, 0.1)]},
        known | {"case": "b", "calibration": used, "buckets": [bucket(0, 0.1, 0.1), bucket(512, 0.12, 0.1)]},
        {"model": "tiny", "protocol": protocol, "case": "c", "refused": "it has no keys"},
    ]
    long_context_page.write_page(tmp_path / "page.md", rows)
    text = (tmp_path / "page.md").read_text()
    assert "| a | 2,048 tokens of t, windows of 512 | all | 12.5% | 0.1000 | 0.1300 (ratio 1.30, missed) |" in text
    assert "| b | 2,048 tokens of t, windows of 512 | all | 12.5% | 0.1000 | 0.1200 (ratio 1.20) |" in text
    assert "| original | - | all | 12.5% | 2.72 | 2.72 |" in text
    assert "- c: it has no keys" in text


@pytest.mark.slow
def test_rows_of_a_converted_model(monkeypatch, tmp_path):
    """Layers that keep their own attention lose nothing; the others do."""
    sizes = ["--length", "512", "--probe", "256", "--calibration-lengths", "64", "--calibration-tokens", "512"]
    cases = ["--only", "12.5 %, decode cost 2", "--layers", "all", "sliding"]
    monkeypatch.setattr(sys, "argv", ["long_context.py", "-o", str(tmp_path), *sizes, *cases])
    long_context.main()
    original, coded, untouched = long_context.Rows(tmp_path / "long-context.json", again=False).rows
    assert original["buckets"][0]["kl"] == 0
    assert coded["buckets"][0]["kl"] > 0.001
    assert untouched["buckets"][0]["kl"] < 1e-6  # it has no sliding layers
    assert (tmp_path / "long-context.md").is_file()

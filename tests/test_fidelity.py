"""The benchmarks: their corpus, held-out text, CARE's ranks, rows that are not measured twice."""

from __future__ import annotations

import importlib
import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anymla.demo import bundled_model
from anymla.io.checkpoint import load_model
from anymla.methods.mla.plan import make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import care
import fidelity
import page
import peers
from testbed.corpus import documents, domains, read_rows, sample

BENCHMARKS = Path(fidelity.__file__).parent


def test_corpus_reads_every_kind(tmp_path):
    rows = [{"domain": "books", "text": " one "}, {"domain": "code", "text": "two"}]
    content = "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content.encode()))
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    expected = [("books", "one"), ("code", "two")]
    assert read_rows(tmp_path / "a.jsonl") == read_rows(tmp_path / "a.jsonl.xz") == expected
    assert read_rows(tmp_path / "a.txt") == [("", "one"), ("", "two")]
    assert documents([tmp_path / "a.jsonl"] * 2, "code") == ["two", "two"]
    assert domains([tmp_path / "a.jsonl", tmp_path / "a.txt"]) == ["books", "code"]
    assert domains([tmp_path / "a.txt"]) == []


def test_sample_is_all_text_in_random_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two three\n<|endoftext|>\nfour")
    drawn = [text for _, text in read_rows(Path(sample([tmp_path / "a.txt"], tmp_path / "b.jsonl", piece=4)))]
    assert sorted(drawn) == sorted(["one", "two", "thre", "e", "four"])


def test_held_out_windows_come_from_every_domain(tmp_path):
    texts = {"books": "the sun", "code": "a dog"}  # hundreds of windows of one, then of the other
    rows = [{"domain": domain, "text": text * 2000} for domain, text in texts.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(row["text"] for row in rows))
    protocol = fidelity.Protocol((), (), 1024, 64, 1024, 64)

    def scored(name, **changes):
        paths = {"held_out": (str(tmp_path / name),)}
        windows = fidelity.held_out_windows(bundled_model(), replace(protocol, **paths, **changes))
        assert windows.shape == (16, 64)
        return set(windows.unique().tolist()) - {1}  # without BOS

    books, code = (scored("a.jsonl", held_out_domain=domain) for domain in texts)
    assert scored("a.jsonl") & (code - books)
    assert scored("a.txt").isdisjoint(code - books)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if "main()" in path.read_text()))
def test_every_benchmark_starts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 12))
def test_water_filled_ranks_take_the_largest_shares(spectra, more):
    spectra = [torch.tensor(sorted(values, reverse=True), dtype=torch.float64) for values in spectra]
    total = min(len(spectra) + more, 4 * len(spectra))
    ranks = care.water_fill(spectra, total)
    assert sum(ranks) == total
    assert all(1 <= rank <= 4 for rank in ranks)
    shares = [values / values.sum().clamp_min(1e-300) for values in spectra]
    taken = [share[1:rank].min() for share, rank in zip(shares, ranks) if rank > 1]
    left = [share[rank] for share, rank in zip(shares, ranks) if rank < 4]
    if taken and left:
        assert min(taken) >= max(left)


@torch.no_grad()
def test_care_without_partial_rope_is_the_original_at_full_rank():
    model, ids = load_model(bundled_model()), torch.arange(40)[None]
    expected, layers = model(ids).logits, model.config.num_hidden_layers
    grams = care.input_grams(model, torch.randint(5, 400, (4, 64), generator=torch.Generator().manual_seed(0)))
    numbers = 64 * layers
    care.without_partial_rope(model, grams, numbers, filled=False)
    assert (model(ids).logits - expected).abs().max() < 1e-3
    care.without_partial_rope(model, grams, numbers // 4, filled=True)
    assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name, method in peers.METHODS.items() if not method.rebuilds])
@pytest.mark.parametrize("budget", fidelity.BUDGETS)
def test_every_setting_can_be_planned_at_its_budget(name, budget):
    model_spec = fidelity.anymla.inspect(bundled_model()).model_spec
    spec = model_spec.layers[0].attention
    settings = peers.METHODS[name].settings(spec, int(spec.cached_numbers * budget))
    assert settings or budget < 0.25
    for changes in settings:
        recipe = {field: value for field, value in changes.items() if field != "filled"}
        plan = make_plan("", model_spec, fidelity.anymla.MLA(kv_cache=budget, **recipe))
        assert all(layer.cached_numbers == int(64 * budget) for layer in plan.layers)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the script with a measurement that only counts."""

    def run(*arguments, calls=[]):  # noqa: B006
        class Now:
            def __init__(self, *_):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def submit(self, call, *job):
                calls.append(job)
                scores = {"perplexity": 5.0, "cache_bytes_per_token": 320, "tokens": 512}
                row = scores | {"kl": 0.5, "top1_agreement": 0.6, "seconds": 1.0, "peak_rss_bytes": 1 << 28}
                fits = job[2] != "MHA2MLA"
                if job[1].probe:
                    value = {"model": {"value": 0.25}, "original": {"value": 0.5}, "difference_stderr": 0.125}
                    row["probe"] = [{"name": "copy", "metric": "accuracy", "part_of": None, "chance": 0.0} | value]
                found = row | {"original": scores | {"cache_bytes_per_token": 1280}, "settings": {"rope": "low"}}
                return type("Done", (), {"result": lambda self: found if fits else {"infeasible": "too small"}})()

        monkeypatch.setattr(fidelity, "ProcessPoolExecutor", Now)
        monkeypatch.setattr(sys, "argv", ["fidelity.py", "-o", str(tmp_path), *arguments])
        fidelity.main()
        return calls

    return run


def test_rows_are_measured_once(measured, tmp_path):
    budgets = ("--budgets", "0.25", "0.125")
    assert len(measured(*budgets)) == 2 * len(peers.METHODS)
    assert len(measured(*budgets)) == 2 * len(peers.METHODS)  # all were there
    assert len(measured(*budgets, "--length", "128")) == 4 * len(peers.METHODS)  # another protocol
    text = (tmp_path / "fidelity.md").read_text()
    assert "| 0.25 | anymla | 320 | 5.00 | 0.500 | 60.0% | 1 | 256 MiB | low |" in text
    assert "does not fit" in text
    assert (tmp_path / "images" / "fidelity.png").stat().st_size > 1000


def test_sensitivity_has_its_own_table(measured, tmp_path):
    measured()
    measured("--sensitivity")
    text = (tmp_path / "fidelity.md").read_text()
    assert "4096 calibration tokens" in text
    assert "windows of 128, scored on 512" in text
    assert "| 0.25 | the default | 320 | 5.00 | 0.500 | 60.0% | 5.00 |" in text
    assert "| 0.125 | no gradient steps | 320 |" in text
    assert "| 0.0625 | copy: accuracy | 0.000 | 0.500 | 0.250 | 0.125 |" in text
    assert page.INTRODUCTION in text

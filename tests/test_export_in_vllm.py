"""The check of an export in vLLM, with a stand-in for vLLM; tests/engines has the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import anymla
from anymla.demo import bundled_model
from anymla.errors import ParityError
from anymla.exports.vllm import vllm_check
from anymla.exports.vllm.writer import load_fused
from tests.damage import run_main
from tests.families import FAST

CACHED = 576  # numbers per token and layer of --pad cpu


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    anymla.convert(bundled_model(), folder, kv_cache=0.5, **FAST)
    return folder


@torch.no_grad()
def ask_transformers(folder, prompts, new, change):
    """What run_vllm.py would answer, by transformers; ``change`` [T,V] is made to the logits."""
    model = load_fused(folder)
    tokens, scores = [], []
    for prompt, count in zip(prompts, new):
        ids = torch.tensor([prompt])
        scores.append(change(model(ids).logits[0]).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
        for _ in range(count):
            ids = torch.cat([ids, change(model(ids).logits[0])[-1:].argmax(-1, keepdim=True)], dim=1)
        tokens.append(ids[0, len(prompt) :].tolist())
    return {
        "tokens": tokens,
        "prompt_logprobs": scores,
        "cache_bytes_per_token": 5 * 4 * CACHED,
        "layers": 5,
        "version": "0.0",
    }, ""


def with_vllm(monkeypatch, change):
    def ask(python, folder, prompts, new, *, trust, length):
        assert trust and length > max(len(prompt) for prompt in prompts)
        return ask_transformers(folder, prompts, new, change)

    monkeypatch.setattr(vllm_check, "vllm_python", lambda: Path(sys.executable))
    monkeypatch.setattr(vllm_check, "ask_vllm", ask)


def with_script(monkeypatch, tmp_path, text):
    (tmp_path / "run.py").write_text(text)
    monkeypatch.setattr(vllm_check, "vllm_python", lambda: Path(sys.executable))
    monkeypatch.setattr(vllm_check, "SCRIPT", tmp_path / "run.py")


def test_the_engine_is_named(converted, tmp_path, monkeypatch, capfd):
    with_vllm(monkeypatch, lambda logits: logits)
    arguments = ["export", str(converted), "--to", "vllm", "-o", str(tmp_path / "out")]
    done = run_main(arguments, monkeypatch, capfd)
    assert done.code == 0
    assert "Checked in vLLM: log probabilities of given tokens within " in done.out
    assert "96 of 96 greedy tokens equal; 576 numbers per token and layer in the cache" in done.out


CHANGES = {
    "tokens": lambda logits: logits.roll(1, dims=-1),
    "scores": lambda logits: 1.1 * logits,  # the same greedy tokens
    "nan": lambda logits: logits * float("nan"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_answer_is_refused(change, converted, tmp_path, monkeypatch):
    with_vllm(monkeypatch, change)
    with pytest.raises(ParityError, match="the export in vLLM is not the converted model: log probabilities"):
        anymla.export(converted, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


REASONS = {
    "raise ValueError('no kernel')": "ValueError: no kernel",
    "raise SystemExit('not on this machine')": "not on this machine",
    "import os; os._exit(7)": "exit code 7",
    "import time; time.sleep(60)": "no answer within 2 s",
}


@pytest.mark.parametrize(("script", "reason"), REASONS.items(), ids=["error", "exit", "crash", "hang"])
def test_vllm_that_does_not_run(script, reason, converted, tmp_path, monkeypatch):
    with_script(monkeypatch, tmp_path, script)
    monkeypatch.setattr(vllm_check, "LIMIT", 2)
    done = anymla.export(converted, tmp_path / "out", "vllm")
    assert (done.parity.engine, done.parity.not_run) == ("transformers", None)
    assert done.parity.engine_failed == f"vLLM is installed but failed: {reason}"
    assert f"vLLM is installed but failed: {reason}. All figures" in (tmp_path / "out" / "README.md").read_text()
    assert (done.parity.compared, done.parity.tokens) == ("logits", 96)


def test_other_paddings_are_checked_in_transformers(converted, tmp_path, monkeypatch):
    with_script(monkeypatch, tmp_path, "raise ValueError('asked')")
    done = anymla.export(converted, tmp_path / "out", "vllm", pad="none")
    assert (done.parity.engine, done.parity.engine_failed) == ("transformers", None)
    assert done.parity.not_run == "vLLM was not run: on CPUs it runs --pad cpu only"


def test_a_failure_is_warned_of(converted, tmp_path, monkeypatch, capfd):
    with_script(monkeypatch, tmp_path, "raise ValueError('no kernel')")
    arguments = ["export", str(converted), "--to", "vllm", "-o", str(tmp_path / "out")]
    done = run_main(arguments, monkeypatch, capfd)
    assert done.code == 0
    said = "warning: vLLM is installed but failed: ValueError: no kernel; checked in transformers only\n"
    assert said in done.err
    done = run_main([*arguments, "--overwrite", "--json"], monkeypatch, capfd)
    assert said in done.err
    assert json.loads(done.out)["parity"]["engine_failed"] == "vLLM is installed but failed: ValueError: no kernel"


def test_vllm_for_another_platform_is_no_failure(converted, tmp_path, monkeypatch):
    """The script asks for the platform before it loads anything."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    platform = "class current_platform:\n    is_cpu = staticmethod(lambda: False)\n"
    (tmp_path / "vllm" / "platforms.py").write_text(platform)
    monkeypatch.setattr(vllm_check, "vllm_python", lambda: Path(sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = anymla.export(converted, tmp_path / "out", "vllm")
    assert (done.parity.engine, done.parity.engine_failed) == ("transformers", None)
    assert done.parity.not_run.startswith("vLLM was not run: the check is for vLLM on CPUs")


def test_a_cache_that_was_not_planned_is_refused(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.CACHED", 577)
    with_vllm(monkeypatch, lambda logits: logits)
    with pytest.raises(ParityError, match="in vLLM caches 577 numbers per token and layer, where 576 were planned"):
        anymla.export(converted, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


def test_where_vllm_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert vllm_check.vllm_python() is None  # a folder of that name is no package
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')")
    assert vllm_check.vllm_python() == Path(sys.executable)

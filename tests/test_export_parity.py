"""What the check of an export sees: wrong weights, scores that are not numbers, another cache."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import anymla
from anymla.errors import ParityError, UnsupportedModelError
from anymla.exports import parity
from anymla.exports.vllm.writer import _check_head
from tests.export_check import FAST, load, refused
from tests.families import save_model
from tests.family_models import tiny_model


def test_refuses_to_call_a_wrong_export_done(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", {"float32": 1e-9})
    call = lambda: anymla.export(stories.converted, tmp_path / "out")  # noqa: E731
    refused(ParityError, tmp_path, call, "not the converted model", "96 of 96")


def test_refuses_a_cache_that_was_not_planned(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_cached_numbers", lambda model, ids: 99.0)
    call = lambda: anymla.export(stories.converted, tmp_path / "out")  # noqa: E731
    refused(ParityError, tmp_path, call, "caches 99 numbers per token and layer", "nothing was written")


def test_refuses_nan(stories, tmp_path):
    """In any place of the scores, and where vLLM's head would be."""
    real = parity._logits
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParityError, match="differ by nan"):
        calls = []

        def spoiled(model, ids):
            calls.append(logits := real(model, ids))
            if len(calls) == 5:  # the export's second
                logits[3, 7] = float("nan")
            return logits

        patch.setattr(parity, "_logits", spoiled)
        parity.check_parity(stories.converted, stories.export)
    model = load(stories.converted)
    _check_head(model)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UnsupportedModelError, match="does more to its logits"):
        _check_head(model)


def test_parity_sees_a_changed_weight(stories, tmp_path):
    """One projection of one layer, a tenth larger."""
    shutil.copytree(stories.export, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1.1
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError):
        parity.check_parity(stories.converted, tmp_path / "export")


def test_a_short_context(tmp_path):
    """GPT-2's positions are a table: prompts and new tokens are cut to it."""
    source = save_model(tiny_model("gpt2", torch.float32, n_positions=48), tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", kv_cache=0.5, **FAST | {"calibration_length": 16})
    done = anymla.export(tmp_path / "converted", tmp_path / "out", "vllm")
    assert done.parity.tokens == done.parity.of == 3 * 24

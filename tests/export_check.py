"""Converted models for exports, and what an export is held to."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

import anymla
from anymla.errors import AnymlaError
from tests.families import logits, save_model, token_ids

FAST = {"calibration_tokens": 512, "calibration_length": 32, "reconstruction_steps": 2}
TARGET = {"kv_cache": 0.5, "target": "deepseek"}


def converted(folder, model, **settings):
    """The model, converted for DeepSeek's layout."""
    source = save_model(model, folder / "source")
    anymla.convert(source, folder / "converted", **FAST | TARGET | settings)
    return folder / "converted"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def difference(before, after, length=40):
    """Largest difference of logits over their standard deviation."""
    expected = logits(before, token_ids(length=length))
    assert expected.std() > 0.05
    return ((logits(after, token_ids(length=length)) - expected).abs().max() / expected.std()).item()


def refused(kind, tmp_path, call, *words):
    """One line that names what is wrong; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as error:
        call()
    assert isinstance(error.value, AnymlaError)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert sorted(tmp_path.rglob("*")) == before

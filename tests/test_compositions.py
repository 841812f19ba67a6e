"""Every method before and behind every other, on a tiny model: it runs, or is refused with the reason in one line."""

from __future__ import annotations

import pytest
import torch

import anymla
from anymla.errors import AnymlaError
from anymla.methods.base import Phase, all_methods
from anymla.recipe import refused_after
from tests.families import FAST, make_model, save_model, token_ids
from tests.method_contract import load, logits
from tests.test_methods import FAST_RUN, SAMPLES, TINY

SETTINGS = {name: sample.settings for name, sample in SAMPLES.items()} | {
    "kv_heads": {"kv_heads": 1, **FAST_RUN},  # a stock model, which every method can have for its own
    "saap": {"neurons": 0.5, "multiple": 8, **FAST_RUN},  # which a single KV head has, too
    "billm": {"block_size": 16, "attention": False, **FAST_RUN},  # stock attention, for codes
    "mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 0},
    "mfa": {"key_reuse": True, **FAST_RUN},
    "tune": TINY | {"tokens": 512},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("pairs") / "source")


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    """The same with a layer more, which may go."""
    model = make_model("llama", torch.float32, num_hidden_layers=3)
    return save_model(model, tmp_path_factory.mktemp("pairs") / "deeper")


def outcome(source, output, first, second):
    """ "runs", or why the second method is refused behind the first."""
    try:
        anymla.run(source, output, steps=[{first: SETTINGS[first]}, {second: SETTINGS[second]}])
    except AnymlaError as error:
        assert not output.exists()
        return str(error)
    assert logits(load(output), token_ids()).isfinite().all()
    return "runs"


@pytest.mark.parametrize("first", SAMPLES)
def test_each_pair_runs_or_says_why_not(first, source, deeper, tmp_path, record_property):
    methods = all_methods()
    assert SETTINGS.keys() == methods.keys()
    model = deeper if methods[first].phase == Phase.DEPTH else source
    found = {second: outcome(model, tmp_path / second, first, second) for second in methods}
    record_property("pairs", found)
    print("\n".join(f"{first} then {second}: {told}" for second, told in found.items()))  # noqa: T201
    assert all("\n" not in told and "steps are kept" not in told for told in found.values())  # before anything ran
    follow = [other for other in methods.values() if refused_after(other, methods[first]) is None]
    follow = [other for other in follow if (first, other.name) != ("mfa", "mla")]  # the bridge leads the other way only
    expected = {other.name for other in follow} if first != "tune" else set()  # a stock model has nothing to recover
    assert {second for second, told in found.items() if told == "runs"} == expected, "docs/methods.md says otherwise"

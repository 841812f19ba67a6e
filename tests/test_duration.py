"""How long a conversion takes is said before it begins, and only where that is long."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

import anymla
from anymla.architectures.model_spec import read_model_spec
from anymla.demo import bundled_model
from anymla.io.device import matmul_speed
from anymla.methods.cache_coding import KVQuant, TransformCoding
from anymla.methods.cache_coding.duration import coded_seconds
from anymla.methods.cache_coding.duration import faster as coded_faster
from anymla.methods.duration import spoken
from anymla.methods.mla.duration import estimated_seconds, faster
from anymla.pipeline import explain_plan
from tests.damage import run_main
from tests.families import FAST
from tests.family_models import tiny_config

SLOW, QUICK = 1e6, 1e12  # operations per second


@pytest.fixture
def slow(monkeypatch):
    """A machine on which any conversion takes hours."""
    for place in ("anymla.sweep.run", "anymla.methods.mla.plan"):
        monkeypatch.setattr(f"{place}.matmul_speed", lambda device="cpu": SLOW)


def model_spec_of(model_type="llama", **sizes):
    return read_model_spec(tiny_config(model_type, **sizes).to_dict())


def test_speed_is_measured():
    assert 1e8 < matmul_speed() < 1e15


def test_more_work_takes_longer():
    recipe = anymla.MLA()
    least = estimated_seconds(model_spec_of(), recipe, SLOW)
    assert least < estimated_seconds(model_spec_of(num_hidden_layers=4), recipe, SLOW)
    assert least < estimated_seconds(model_spec_of(vocab_size=5000), recipe, SLOW)
    assert least < estimated_seconds(model_spec_of(), recipe.model_copy(update={"calibration_tokens": 65536}), SLOW)
    assert least > estimated_seconds(model_spec_of(), recipe.model_copy(update={"reconstruction_steps": 0}), SLOW)
    assert least > estimated_seconds(model_spec_of(), recipe, QUICK)
    hybrid = model_spec_of("qwen3_next", num_hidden_layers=2)
    assert estimated_seconds(hybrid, recipe, SLOW) > 0


@pytest.mark.parametrize("step", [TransformCoding, KVQuant])
def test_more_work_takes_longer_with_codes(step):
    least = coded_seconds(model_spec_of(), step(), SLOW)
    assert least < coded_seconds(model_spec_of(num_hidden_layers=4), step(), SLOW)
    assert least < coded_seconds(model_spec_of(vocab_size=5000), step(), SLOW)
    assert least < coded_seconds(model_spec_of(), step(calibration_tokens=65536), SLOW)
    assert least > coded_seconds(model_spec_of(), step(), QUICK) > 0


def test_what_is_faster_is_offered_with_its_time():
    recipe = anymla.MLA()
    said = faster(model_spec_of(), recipe, SLOW)
    assert "takes about" in said and "--reconstruction-steps 0 (about" in said
    assert faster(model_spec_of(), recipe, QUICK) is None
    bare = anymla.MLA(reconstruction_steps=0, calibration_tokens=1024)
    assert faster(model_spec_of(), bare, 1e4).endswith(" here.")  # nothing is left to leave out
    fewer = faster(model_spec_of(), anymla.MLA(reconstruction_steps=0, calibration_tokens=1 << 20), SLOW)
    assert "--calibration-tokens 8192 (about" in fewer and "--reconstruction-steps" not in fewer


def test_times_are_spoken():
    assert [spoken(seconds) for seconds in (3, 600, 5940, 7200)] == ["1 min", "10 min", "99 min", "2 hours"]


def test_a_plan_says_how_long(slow):
    costs = explain_plan(anymla.plan(bundled_model()))
    assert costs["estimated_seconds"] > 600
    assert any("--reconstruction-steps 0" in note for note in costs["notes"])


def test_a_plan_of_a_small_model_offers_nothing_faster():
    costs = explain_plan(anymla.plan(bundled_model(), **FAST))
    assert 0 < costs["estimated_seconds"] < 600
    assert not any("Faster" in note for note in costs["notes"])


def test_a_conversion_to_codes_says_it_once(slow, tmp_path):
    notes, options = [], {"codec": "kvquant", "calibration_tokens": 8192, "calibration_length": 64}

    def stop(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    for progress in (stop, None):
        with suppress(KeyboardInterrupt):
            anymla.convert(bundled_model(), tmp_path / "out", progress=progress, notify=notes.append, **options)
    first, second = notes
    assert "takes about" in first and "--calibration-tokens 4096 (about" in first
    assert second.startswith("this goes on with what was kept: 2 of 5 ")
    assert coded_faster(model_spec_of(), KVQuant(), QUICK) is None
    assert coded_faster(model_spec_of(), KVQuant(calibration_tokens=512), 1e4).endswith(" here.")


@pytest.mark.parametrize("long", [True, False])
def test_the_command_says_it_once_before_long_work(long, tmp_path, monkeypatch, capfd, request):
    if long:
        request.getfixturevalue("slow")
    options = [text for name, value in FAST.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = run_main(
        ["convert", str(bundled_model()), "-o", str(tmp_path / "out"), "--json", *options], monkeypatch, capfd
    )
    assert done.code == 0 and json.loads(done.out)
    assert done.err.count("note: The conversion takes about") == long
    assert ("--reconstruction-steps 0 (about" in done.err) == long

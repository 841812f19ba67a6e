"""What `anymla convert` makes of a cache: codes by default, the step mla where something asks for it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import anymla
from anymla.architectures.model_spec import read_model_spec
from anymla.codec_choice import Choice
from anymla.demo import bundled_model
from anymla.errors import RecipeError, UnsupportedModelError
from anymla.methods.mla.settings import MLA
from anymla.recipe import Recipe
from tests.damage import run_main
from tests.families import token_ids
from tests.family_models import tiny_config

FEW = "--calibration-tokens 1024 --calibration-length 64"


def spec_of(family="llama", **changes):
    return read_model_spec(tiny_config(family, **changes).to_dict())


@pytest.mark.parametrize(
    ("codec", "recipe", "settings", "step", "why"),
    [
        ("auto", None, {"kv_cache": 0.125}, "transform_coding", "loses least per byte"),
        ("auto", None, {"exact_window": 8, "decode_cost": 1.5}, "transform_coding", "loses least per byte"),
        ("auto", None, {"effort": "quick"}, "transform_coding", "loses least per byte"),
        ("auto", None, {"effort": "quick", "target": "gguf"}, "mla", "only this step has the setting target"),
        ("auto", None, {"target": "gguf"}, "mla", "only this step has the setting target"),
        ("auto", None, {"kv_cache": 0.5, "reconstruction_steps": 0}, "mla", "only this step has the setting"),
        ("auto", MLA(rope="high"), {"seed": 2}, "mla", None),
        ("none", None, {"kv_cache": 0.125}, "mla", None),
        ("transform_coding", None, {"decode_cost": "any"}, "transform_coding", None),
        ("kvquant", None, {}, "kvquant", None),
    ],
)
def test_what_is_chosen_and_why(codec, recipe, settings, step, why):
    choice = Choice.of(codec, recipe, settings).for_model(spec_of())
    assert choice.method.name == step
    assert settings.items() <= choice.method.model_dump().items()
    assert choice.told is None if why is None else f"chose {step}: " in choice.told and why in choice.told


def test_a_model_that_has_no_codes_gets_the_step_mla():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    dynamic = spec_of(rope_parameters=rope)
    choice = Choice.of("auto", None, {"kv_cache": 0.5}).for_model(dynamic)
    assert choice.method == MLA(kv_cache=0.5) and "rope is dynamic" in choice.told
    assert Choice.of("auto", None, {"effort": "quick"}).for_model(dynamic).method == MLA(effort="quick")
    for codec, settings in (("transform_coding", {}), ("auto", {"decode_cost": 1.0})):
        with pytest.raises(UnsupportedModelError, match="cannot have transform_coding: its rope is dynamic"):
            Choice.of(codec, None, settings).for_model(dynamic)


@pytest.mark.parametrize(
    ("codec", "recipe", "settings", "message"),
    [
        ("zip", None, {}, "codec must be auto, none or one of kvquant, transform_coding"),
        ("mla", None, {}, "codec must be"),
        ("kvquant", None, {"kv_cache": 0.5}, "kv_cache"),
        ("none", None, {"decode_cost": 2.0}, "decode_cost"),
        ("kvquant", None, {"target": "gguf"}, "no engine reads codes, .* give --cache-type q8_0 or q4_0"),
        ("kvquant", MLA(), {}, "needs codec none"),
    ],
)
def test_what_does_not_go_together_is_named(codec, recipe, settings, message):
    with pytest.raises(RecipeError, match=message):
        Choice.of(codec, recipe, settings)


def test_convert_writes_codes_and_says_so(tmp_path, monkeypatch, capfd):
    arguments = ["convert", str(bundled_model()), "-o", str(tmp_path / "out"), *FEW.split(), "--kv-cache", "0.25"]
    run = run_main([*arguments, "--max-shard-size", "50KB"], monkeypatch, capfd)
    assert run.code == 0, run.err
    assert run.out.startswith("--codec auto chose transform_coding: it loses least per byte")
    assert "multi" in run.out and "anymla compare" in run.out
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["after"]["cache_bytes_per_token"] == 160 and report["after"]["kl"] < 0.02
    assert [layer["layer"] for layer in report["layers"]] == list(range(5))
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "transform_coding" in card and "same top token" in card and "| converted | " in card
    assert "share of the original's cache in 16 bits" in run.err  # the bundled checkpoint is in float32
    recipe = Recipe.of(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()))
    assert recipe.steps[0].kv_cache == 0.25 and recipe.steps[0].decode_cost == 2
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids()).logits.isfinite().all()


def test_the_whole_budget_changes_nothing(tmp_path):
    done = anymla.convert(
        bundled_model(), tmp_path / "out", kv_cache=1.0, calibration_tokens=1024, calibration_length=64
    )
    assert done.method.name == "transform_coding" and done.layers == ()
    assert done.after.kl < 1e-6 and done.after.cache_bytes_per_token == done.before.cache_bytes_per_token == 1280

"""Fewer KV heads in a checkpoint: its folder, generate, the steps before and after, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.stock_config import config_after
from anymla.errors import AnymlaError
from anymla.methods.kv_heads import KVHeads
from tests.damage import TRAIN, VALID
from tests.families import logits as logits_of
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.vision_models import tiny_vision_config

CALIBRATION = {"calibration_tokens": 1024, "calibration_length": 64}
BEFORE = {"kv_heads": {"kv_heads": 1, **CALIBRATION}}
PAIRS = {
    "mla": {"mla": {"kv_cache": 0.5, "reconstruction_steps": 2, **CALIBRATION}},
    "kvquant": {"kvquant": {"bits": 4, **CALIBRATION}},
    "transform_coding": {"transform_coding": {"kv_cache": 0.5, **CALIBRATION}},
}


def test_the_folder_is_a_stock_one(tmp_path):
    """Plain Qwen2 with biases and windows: no code, no field of ours, and as many bytes as planned."""
    changes = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_key_value_heads": 6}
    source = save_model(make_model("qwen2", torch.float32, **changes), tmp_path / "source")
    anymla.run(source, tmp_path / "out", steps=[{"kv_heads": {"kv_cache": 0.5, **CALIBRATION}}])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("qwen2", 3)
    assert not {"auto_map", "anymla", "kv_lora_rank"} & config.keys() and not [*(tmp_path / "out").glob("*.py")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.model.layers[0].self_attn.k_proj.out_features == 24
    account = json.loads((tmp_path / "out" / "account.json").read_text())
    cached = 2 * 2 * 3 * 8 * 4  # layers, keys and values, heads, numbers, bytes
    assert account["cache_bytes_per_token"] == account["measured"]["cache_bytes_per_token"] == cached
    with pytest.raises(AnymlaError, match="nothing to recover"):
        anymla.run(tmp_path / "out", tmp_path / "again", steps=["tune"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("kv-heads") / "source")


@pytest.mark.parametrize("after", PAIRS)
def test_what_can_follow(source, tmp_path, after):
    done = anymla.run(source, tmp_path / "out", steps=[BEFORE, PAIRS[after]])
    first, second = (step.account.cache_bytes_per_token for step in done.steps)
    assert done.original.account.cache_bytes_per_token == 3 * first and second < first
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("anymla_llama", 1)
    if after == "mla":
        told, card = (tmp_path / "out" / name for name in ("conversion.json", "README.md"))
        assert json.loads(told.read_text())["model"] == str(source)
        assert "step-1" not in told.read_text() + card.read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logits_of(model, token_ids()).isfinite().all()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["mla", "kv_heads"], "WIDTH comes before ATTENTION"),
        (["kvquant", "kv_heads"], "WIDTH comes before CACHE"),
        ([{"kv_heads": {"variant": "post", "kv_heads": 1}}, "mla"], "step 2, mla, .*put mla before"),
        (
            [{"kv_heads": {"variant": "values", "kv_heads": 1}}, "kvquant"],
            "step 2, kvquant, .*share keys after rope, or values",
        ),
        ([{"kv_heads": {"kv_heads": 2}}], "does not divide the model's 3: take 3, 1"),
        ([{"kv_heads": {"kv_cache": 0.1}}], "the least is 0.3333"),
        ([{"kv_heads": {"kv_cache": 0.5, "kv_heads": 1}}], "give one of them"),
        ([{"kv_heads": {"variant": "post", "svd": "weights"}}], "svd must be activations"),
    ],
)
def test_what_cannot(source, tmp_path, steps, said):
    with pytest.raises(AnymlaError, match=said):
        anymla.run(source, tmp_path / "out", steps=steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("qwen3", {}, "pass a norm.*variant: post or values"),
        ("gpt2", {}, "no config of its family.*variant: post or values"),
        ("olmo", {"variant": "values"}, "may be clipped"),
        ("qwen3_next", {"variant": "values"}, "a gate on the heads' output"),
        ("gpt_oss", {"grouping": "overlap"}, "attention sinks.*grouping: adjacent"),
        ("bloom", {"variant": "values", "grouping": "overlap"}, "position biases.*grouping: adjacent"),
    ],
)
def test_families_that_are_refused(family, settings, said):
    """From the config alone."""
    spec = read_model_spec(tiny_model(family).config.to_dict())
    assert re.search(said, KVHeads(**settings).refuses(spec) or "")


def test_tuning_a_stock_model_keeps_it_one(source, tmp_path):
    tune = {"data": [str(TRAIN)], "eval_data": str(VALID), "eval_tokens": 256, "tokens": 4096, "length": 64, "batch": 8}
    anymla.run(source, tmp_path / "out", steps=[BEFORE, {"tune": tune | {"device": "cpu"}}])
    told = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert told["after"]["kl"] < told["before"]["kl"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    with pytest.raises(AnymlaError, match="was not converted by anymla"):
        anymla.tune(source, tmp_path / "again", teacher=source, data=str(TRAIN))


def test_configs_that_say_a_number_of_kv_heads():
    """The table is what transformers' configs have; the two that are left out do not mean it, or keep it inside."""
    for name, family in FAMILIES.items():
        fields = CONFIG_MAPPING[name].__dataclass_fields__ if name in CONFIG_MAPPING else {}
        has = bool({"num_key_value_heads", "num_kv_heads"} & {*fields})
        assert not fields or has == family.says_kv_heads or name in ("falcon", "dbrx"), name


def test_fields_that_a_step_changes_are_those_of_the_text_model():
    config = tiny_vision_config("llava")
    spec = read_model_spec(config.to_dict())
    after = KVHeads(kv_heads=1).plan(spec).after
    made = config_after(config, spec, after)
    assert made.text_config.num_key_value_heads == 1 != config.text_config.num_key_value_heads
    assert config_after(config, spec, spec) is config
    uneven = replace(after, layers=(spec.layers[0], *after.layers[1:]))
    with pytest.raises(AnymlaError, match="can say num_kv_heads"):
        config_after(config, spec, uneven)

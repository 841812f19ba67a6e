"""Bytes of the cache at a length are those of the tensors in transformers' cache, before and after conversion."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.account import account, in_dtype, measure, told_lengths
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.demo import bundled_model
from anymla.methods.mla.costs import original_cost
from anymla.methods.mla.layer_plan import spec_after
from anymla.modeling.arguments import cache_argument
from tests.families import save_model, token_ids
from tests.family_check import load
from tests.family_models import FULL_FIRST, SINCE, VARIANTS, tiny_config, tiny_model
from tests.vision_models import tiny_vision_config

FAST = {"calibration_tokens": 512, "calibration_length": 32, "reconstruction_steps": 0}
LENGTHS = (3, 11, 12, 13, 40)  # below, at and beyond a window of 12 and a chunk of 16
STEPS = 3
AT = sorted({*LENGTHS, *(length + STEPS for length in LENGTHS)})

CASES = {
    "no window": ("llama", {}, {}),
    "all slide": ("mistral", {}, {}),
    "some slide": ("gemma3_text", {}, {}),
    "some slide, soft-cap": ("gemma2", {}, {}),
    "from a layer on": ("qwen2", {"num_hidden_layers": 3, "max_window_layers": 2}, {}),
    "sinks": ("gpt_oss", {"layer_types": FULL_FIRST}, {}),
    "chunks": ("llama4_text", {}, {}),
    "a window of the mask alone": ("gpt_neo", {}, {}),
    "repeated heads": ("falcon", {"new_decoder_architecture": True}, {}),
    "hybrid": ("qwen3_next", {}, {}),
    "state space beside attention": ("falcon_h1", {}, {}),
    "another dtype": ("ministral", {}, {"dtype": "bfloat16"}),
    "exact window": ("llama", {}, {"exact_window": 12}),
    "exact window beside slides": ("gemma3_text", {}, {"exact_window": 5}),
}


def stored(cache):
    """Bytes of keys and values, or of latents and rope keys, with those of exact windows."""
    rooms = [room for layer in cache.layers for room in (layer, getattr(layer, "exact", None))]
    tensors = [getattr(room, name, None) for room in rooms for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def measured(model):
    """Bytes by length: behind prompts of LENGTHS, and behind some tokens that were decoded after each."""
    found = {}
    for length in LENGTHS:
        ids = token_ids(1, length + STEPS)
        cache = DynamicCache(config=model.config)
        given = {cache_argument(model): cache, "use_cache": True}
        model(input_ids=ids[:, :length], **given)
        found["prompt", length] = stored(cache)
        for index in range(length, length + STEPS):
            model(input_ids=ids[:, index : index + 1], **given)
        found["decode", length + STEPS] = stored(cache)
    return found


def told(count, cases):
    """What an account says of the lengths in ``cases``."""
    return {when: count.cache_bytes_at[str(when[1])] for when in cases}


@pytest.mark.parametrize("case", CASES)
def test_bytes_at_a_length_are_those_of_the_cache(case, tmp_path):
    model_type, changes, settings = CASES[case]
    source = save_model(tiny_model(model_type, torch.float32, **changes), tmp_path / "source")
    report = anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST, **settings)
    model_spec, recipe = read_model_spec(read_config(source)), report.plan.recipe
    original, converted = load(source, dtype=recipe.dtype or "float32"), load(tmp_path / "out")
    before, after = measured(original), measured(converted)
    planned = spec_after(model_spec, report.plan.recipe, report.plan.layers)
    assert told(account(in_dtype(model_spec, recipe.dtype), AT), before) == before
    assert told(measure(original, AT), before) == before
    for count in (account(planned, AT), account(report.spec, AT), measure(converted, AT), measure(converted, AT, 40)):
        assert told(count, after) == after
    longest = max(length for _, length in before)
    if not recipe.exact_window and model_type != "falcon":  # of what slides as of what does not, half is left
        assert after["decode", longest] <= 0.5 * before["decode", longest]


def test_every_place_says_the_same(tmp_path):
    source = save_model(tiny_model("gemma3_text", torch.float32), tmp_path / "source")
    context, per_token = 256, 2 * 48 * 4
    whole = {str(context): 48 * 4 * (context + 11)}  # a window of 12 keeps 11 for the next token to see
    facts = anymla.inspect(source).to_dict()
    assert (facts["cache_bytes_per_token"], facts["cache_bytes_at"]) == (per_token, whole)
    half = {"before": whole[str(context)], "after": whole[str(context)] // 2}
    planned = anymla.plan(source, kv_cache=0.5)
    assert anymla.pipeline.explain_plan(planned)["cache_bytes_at"] == {str(context): half}
    anymla.convert(source, tmp_path / "out", planned.recipe, **FAST)
    assert json.loads((tmp_path / "out/conversion.json").read_text())["cache_bytes_at"] == {str(context): half}
    card = (tmp_path / "out/README.md").read_text()
    assert f"| bytes at {context} tokens |" in card and "hold only their window" in card
    assert f"| {per_token} | {half['before']:,} |\n" in card and f"| {per_token // 2} | {half['after']:,} |\n" in card


def test_a_card_without_windows_does_not_speak_of_them(tmp_path):
    anymla.convert(bundled_model(), tmp_path / "out", **FAST)
    card = (tmp_path / "out/README.md").read_text()
    assert "| bytes at 512 tokens |" in card and "sliding window" not in card


def test_lengths_are_those_that_the_context_holds():
    model_spec = read_model_spec(tiny_config("gemma3_text", max_position_embeddings=131072).to_dict())
    assert told_lengths(model_spec) == [4096, 32768, 131072]
    assert told_lengths(read_model_spec(tiny_config("llama", max_position_embeddings=4096).to_dict())) == [4096]


def test_operations_of_a_layer_that_slides_are_those_within_its_window():
    sliding, full = read_model_spec(tiny_config("gemma2").to_dict()).attention_layers.values()
    costs = [original_cost(layer, 48).flops_per_token for layer in (sliding, full)]
    assert costs[1] - costs[0] == 4 * 48 * (4096 - 12)


def windows_of_stock(config):
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


@pytest.mark.parametrize(
    ("name", "model_type", "changes"),
    [(name, name, {}) for name, family in FAMILIES.items() if not family.inside] + VARIANTS,
)
def test_windows_are_those_of_stock(name, model_type, changes):
    if model_type in SINCE or model_type not in CONFIG_MAPPING:
        pytest.importorskip("transformers", minversion=SINCE.get(model_type, "5.24"))
    config = tiny_config(model_type, **changes)
    layers = [layer.attention for layer in read_model_spec(config.to_dict()).layers]
    expected = windows_of_stock(config)
    assert [layer and layer.cache_window for layer in layers] == [
        window if layer else None for layer, window in zip(layers, expected, strict=True)
    ]


@pytest.mark.parametrize("model_type", ["gemma3", "llama4", "mistral3", "qwen2_5_vl"])
def test_windows_of_vision_language_models_are_those_of_stock(model_type):
    config = tiny_vision_config(model_type)
    layers = [layer.attention for layer in read_model_spec(config.to_dict()).layers]
    assert [layer and layer.cache_window for layer in layers] == windows_of_stock(config)


@pytest.mark.parametrize(
    "model_type",
    [
        "cohere2",
        "cohere_compass_text",
        "cwm",
        "dots1",
        "exaone4",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "granite_swa",
        "laguna",
        "llama4_text",
        "mellum",
        "modernbert-decoder",
        "qwen2",
        "vaultgemma",
    ],
)
def test_a_config_without_layer_types_means_what_stock_makes_of_it(model_type):
    stored_config = tiny_config(model_type, **{"num_hidden_layers": 2}).to_dict()
    sizes = {name: value for name, value in stored_config.items() if name not in ("layer_types", "no_rope_layers")}
    sizes["num_hidden_layers"] = 9
    for per_layer in ("mlp_layer_types", "num_attention_heads_per_layer", "layer_rope_theta"):
        sizes.pop(per_layer, None)
    stock = CONFIG_MAPPING[model_type](**{name: value for name, value in sizes.items() if name != "model_type"})
    attentions = [layer.attention for layer in read_model_spec(sizes).layers]
    found = [attention and attention.cache_window for attention in attentions]
    assert found == windows_of_stock(stock)

"""What is counted from a spec is what is measured from tensors: weights and cache, of every family."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.account import account, in_dtype, measure, told_lengths
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import converted_spec, read_config, read_model_spec, spec_of
from anymla.io.checkpoint import check_weights, load_model
from anymla.methods.mla.layer_plan import spec_after
from anymla.modeling.arguments import cache_argument
from anymla.modeling.attention_spec import CONFIG_FIELDS, AttentionSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import DTYPE_BYTES, KEY, LayerSpec
from anymla.stored_bytes import sized, stored_bytes
from tests.damage import TRAIN, VALID
from tests.families import make_model, save_model, token_ids
from tests.family_check import load
from tests.family_models import FULL_FIRST, SINCE, VARIANTS, tiny_config, tiny_model
from tests.vision_models import tiny_vision_model

FAST = {"calibration_tokens": 256, "calibration_length": 32, "reconstruction_steps": 0}
LENGTHS = (3, 11, 12, 13, 40, 300)  # below, at and beyond a window of 12 and a chunk of 16
CASES = [(name, name, {}) for name, family in FAMILIES.items() if not family.inside] + VARIANTS


def spec_in(folder):
    """The spec of a checkpoint, converted or not, with the bytes that its files hold."""
    config = read_config(folder)
    spec = spec_of(config)
    return sized(spec, stored_bytes(spec, check_weights(folder)))


def bytes_in(folder):
    """Bytes of a checkpoint's weight files without their headers."""
    files = check_weights(folder)
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def held(cache):
    """Bytes of keys and values, or of latents and rope keys, with those of exact windows."""
    rooms = [room for layer in cache.layers for room in (layer, getattr(layer, "exact", None))]
    tensors = [getattr(room, name, None) for room in rooms for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def really_held(model, length):
    """Bytes that ``length`` tokens take in a cache, all but the last of them read at once."""
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache, "use_cache": True}
    ids = token_ids(1, length)
    model(input_ids=ids[:, :-1], **given)
    model(input_ids=ids[:, -1:], **given)
    return held(cache)


def check(folder, model=None):
    """The account of a folder is that of its files and of its model."""
    spec = spec_in(folder)
    counted = account(spec, LENGTHS)
    assert counted == measure(load(folder) if model is None else model, LENGTHS)
    assert counted.weight_bytes == bytes_in(folder)
    return counted


def check_written(folder):
    """account.json says the same twice, and what the folder holds."""
    told = json.loads((folder / "account.json").read_text())
    measured = told.pop("measured")
    assert told.pop("dtype") == read_config(folder)["dtype"]
    assert told == measured == account(spec_in(folder)).to_dict()
    assert told["weight_bytes"] == bytes_in(folder)


@pytest.mark.parametrize(("name", "model_type", "changes"), CASES, ids=[case[0] for case in CASES])
def test_every_family(tmp_path, name, model_type, changes):
    if model_type in SINCE or model_type not in CONFIG_MAPPING:
        pytest.importorskip("transformers", minversion=SINCE.get(model_type, "5.24"))
    source = save_model(tiny_model(model_type, torch.float32, **changes), tmp_path / "source")
    before = check(source)
    for share in (1.0, 0.5):
        folder = tmp_path / f"{share}"
        anymla.convert(source, folder, kv_cache=share, **FAST)
        after = check(folder)
        check_written(folder)
        assert share == 1.0 or after.cache_bytes_per_token < before.cache_bytes_per_token


@pytest.mark.parametrize(
    ("model_type", "changes", "settings"),
    [
        ("llama", {}, {"exact_window": 12}),
        ("llama", {"tie_word_embeddings": True}, {"rope": "freqfold-2", "exact_window": 5}),
        ("qwen3", {}, {"exact_window": 12}),
        ("olmoe", {}, {"exact_window": 12}),
        ("cohere", {}, {"exact_window": 12}),
        ("gemma3_text", {"tie_word_embeddings": True}, {"exact_window": 5}),
        ("gpt_oss", {"layer_types": FULL_FIRST}, {"exact_window": 7, "dtype": "bfloat16"}),
        ("qwen3_next", {}, {"dtype": "bfloat16"}),
        ("llama", {}, {"target": "deepseek"}),
        ("qwen3", {}, {"target": "deepseek", "static_qk_norm": True}),
        ("qwen3", {}, {"target": "vllm"}),
    ],
)
def test_windows_ties_dtypes_and_targets(tmp_path, model_type, changes, settings):
    source = save_model(tiny_model(model_type, torch.float32, **changes), tmp_path / "source")
    check(source)
    report = anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST, **settings)
    check_written(tmp_path / "out")
    model = load(tmp_path / "out")
    counted = check(tmp_path / "out", model)
    for length in LENGTHS[:-1]:
        assert counted.cache_bytes_at[str(length)] == really_held(model, length)
    assert counted.cache_bytes_once == report.after.cache_window_bytes
    assert replace(report.spec, layers=()) == replace(converted_spec(read_config(tmp_path / "out")), layers=())
    planned = account(spec_after(read_model_spec(read_config(source)), report.plan.recipe, report.plan.layers), LENGTHS)
    assert planned.cache_bytes_at == counted.cache_bytes_at
    assert planned.cache_bytes_once == counted.cache_bytes_once


def test_what_is_stored_in_16_bits_is_told_so_whatever_is_computed_in(tmp_path):
    source = save_model(tiny_model("llama", torch.bfloat16), tmp_path / "source")
    check(source, load(source).float())


def test_shards(tmp_path):
    source = save_model(make_model("qwen3", torch.float32), tmp_path / "source", max_shard_size="50KB")
    assert len(check_weights(source)) > 2
    check(source)
    anymla.convert(source, tmp_path / "out", max_shard_size="50KB", **FAST)
    assert len(check_weights(tmp_path / "out")) > 2
    check_written(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["gemma3", "internvl", "llava", "qwen2_5_vl"])
def test_vision_language_models(tmp_path, model_type):
    source = save_model(tiny_vision_model(model_type, torch.float32), tmp_path / "source")
    model = load_model(source)
    assert account(spec_in(source), LENGTHS) == measure(model, LENGTHS)
    anymla.convert(source, tmp_path / "out", **FAST)
    check_written(tmp_path / "out")
    check(tmp_path / "out", load_model(tmp_path / "out"))


def test_tune_writes_it(tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", exact_window=5, **FAST)
    tuned = {"data": [str(TRAIN)], "eval_data": str(VALID), "eval_tokens": 256, "length": 32, "tokens": 256}
    tuned |= {"learning_rate": 0.001}
    anymla.tune(tmp_path / "converted", tmp_path / "out", teacher=source, device="cpu", **tuned)
    check_written(tmp_path / "out")
    texts = [(tmp_path / name / "account.json").read_text() for name in ("converted", "out")]
    assert texts[0] == texts[1]


def test_a_config_of_0_1_means_the_same(tmp_path):
    source = save_model(tiny_model("gemma2", torch.float32), tmp_path / "source")
    anymla.convert(source, tmp_path / "out", **FAST)
    config = read_config(tmp_path / "out")
    listed = []
    for layer in config.pop(KEY)["layers"]:
        layer = json.loads(json.dumps(layer))
        known = {name: value for name, value in layer["attention"].items() if name not in CONFIG_FIELDS[4:]}
        listed.append({"module": layer["module"]} | known | layer["latent"])
    old = converted_spec(config | {"mla_layers": listed})
    assert old == converted_spec(read_config(tmp_path / "out"))


def test_what_only_a_config_says_has_no_weights():
    spec = read_model_spec(tiny_config("llama").to_dict())
    assert account(spec).weight_bytes is None
    assert account(in_dtype(spec, "float64")).cache_bytes_per_token == 8 * 2 * 2 * 3 * 8
    assert [*account(spec).cache_bytes_at] == [str(length) for length in told_lengths(spec)]


def random_layer(choose):
    heads = choose.choice([1, 2, 4])
    window = choose.choice([None, None, 2, 9, 64])
    attention = AttentionSpec(
        num_heads=heads * choose.choice([1, 3]),
        num_kv_heads=heads,
        head_dim=choose.choice([4, 7, 16]),
        rope_pairs=2,
        sliding_window=window,
        cache_window=window,
        scaling=0.5,
        norms=choose.choice([None, ("q_norm", "k_norm")]),
        sinks=choose.random() < 0.5,
    )
    latent = LatentSpec(
        kv_lora_rank=choose.randrange(1, 40),
        qk_rope_head_dim=2 * choose.randrange(5),
        exact_window=0 if window else choose.choice([0, 5, 64]),
    )
    kind = choose.random()
    sizes = {"attention_bytes": choose.randrange(1000), "other_bytes": choose.randrange(1000)}
    if kind < 0.2:
        return LayerSpec(**sizes)
    return LayerSpec(attention=attention, latent=latent if kind < 0.7 else None, **sizes)


@pytest.mark.parametrize("seed", range(30))
def test_any_spec(seed):
    choose = random.Random(seed)
    dtype = choose.choice([*DTYPE_BYTES])
    layers = tuple(random_layer(choose) for _ in range(choose.randrange(1, 6)))
    stock = read_model_spec(tiny_config("llama").to_dict())
    spec = replace(stock, layers=layers, dtype=dtype, outside_bytes=choose.randrange(1000))
    lengths = sorted({0, 1, *(choose.randrange(200) for _ in range(20)), 1000, 1001})
    counted = account(spec, lengths)
    sizes = [*counted.cache_bytes_at.values()]
    assert sizes == sorted(sizes) and sizes[0] == 0
    assert counted.weight_bytes == spec.outside_bytes + sum(layer.weight_bytes for layer in counted.layers)
    slides = any(layer.attention and layer.attention.cache_window for layer in layers)
    for length, size in zip(lengths, sizes, strict=True):
        most = counted.cache_bytes_once + counted.cache_bytes_per_token * length
        assert size <= most
        assert slides or length < 63 or size == most
    doubled = in_dtype(replace(spec, dtype="float32"), "float64")
    assert account(doubled, lengths).cache_bytes_at == {
        at: 2 * size for at, size in account(replace(spec, dtype="float32"), lengths).cache_bytes_at.items()
    }
    assert doubled.outside_bytes == 2 * spec.outside_bytes

"""A window of exact tokens: one softmax over exact and latent keys, in every way of running, at stated bytes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import anymla
from anymla.account import measure
from anymla.errors import AnymlaError
from anymla.io.checkpoint import load_model
from anymla.modeling.exact_cache import ExactWindowLayer
from anymla.modeling.exact_window import ExactWindowAttention
from anymla.modeling.spec import layers_of
from tests.damage import BUNDLED, TRAIN, VALID
from tests.families import FAST, converted_layers, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.precision import Exact

WINDOW = 6
TUNING = {
    "tokens": 12800,
    "length": 64,
    "batch": 4,
    "learning_rate": 5e-4,
    "device": "cpu",
    "eval_data": str(VALID),
    "eval_tokens": 1024,
}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}


def converted(tmp_path, source, **changes):
    anymla.convert(source, tmp_path / "out", overwrite=True, **FAST | {"exact_window": WINDOW} | changes)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()


@torch.no_grad()
def forward(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def close(a, b, tolerance=1e-9):
    return (a - b).abs().max().item() < tolerance


def off(a, b):
    return (a - b).abs().max().item()


# --- Converted models

MODELS = {
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-mqa-bias": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen2-one-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def source(request, tmp_path_factory):
    """A tiny model in float64."""
    family, changes = request.param
    return save_model(make_model(family, torch.float64, **changes), tmp_path_factory.mktemp(family) / "source")


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    """The same, converted to half its cache and an exact window."""
    return converted(tmp_path_factory.mktemp("half"), source, kv_cache=0.5)


# softcap; sinks; clip; ALiBi; a gain after rope; a query scale; interleaved pairs; a gate
FAMILIES = ["gemma2", "gpt_oss", "olmo", "bloom", "persimmon", "ministral3", "cohere", "qwen3_next"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_are_exact_at_full_budget_and_in_the_cache(tmp_path, model_type):
    try:
        tiny = tiny_model(model_type)
    except KeyError:
        pytest.skip(f"the installed transformers has no {model_type}")
    with Exact():
        source, ids = save_model(tiny, tmp_path / "source"), token_ids()
        whole = converted(tmp_path, source, kv_cache=1.0, calibration_tokens=512, calibration_length=32)
        original = load_model(source)
        assert any(layer.latent.exact_window == WINDOW for layer in converted_layers(whole.config))
        assert off(forward(whole, ids, use_cache=False), forward(original, ids, use_cache=False)) < 1e-9
        half = converted(tmp_path, source, kv_cache=0.5, calibration_tokens=512, calibration_length=32)
        full, cache = forward(half, ids, use_cache=False), DynamicCache(config=half.config)
        steps = [forward(half, part, past_key_values=cache) for part in ids.split([20, *[1] * 20], dim=1)]
        assert off(torch.cat(steps, 1), full) < 1e-9


def test_full_budget_is_the_original(tmp_path, source):
    ids = token_ids()
    whole = forward(converted(tmp_path, source, kv_cache=1.0), ids, use_cache=False)
    assert close(whole, forward(load_model(source), ids, use_cache=False))


def test_tokens_within_the_window_are_the_originals(tmp_path, source):
    """Whatever the budget: they read no latent. The output projection stays as it was, so that nothing else moves."""
    found = converted(tmp_path, source, kv_cache=0.3, factorization="whitened", reconstruction_steps=0)
    ids = token_ids()
    now, before = (forward(each, ids, use_cache=False) for each in (found, load_model(source)))
    inside = 0 if any(not layer.latent.exact_window for layer in converted_layers(found.config)) else WINDOW
    assert inside == 0 or close(now[:, :inside], before[:, :inside])
    assert off(now[:, WINDOW:], before[:, WINDOW:]) > 1e-3


@pytest.mark.parametrize("sizes", [[13, 13, 13, 1], [1] * 40, [20, *[1] * 20], [5, 1, 30, 4]], ids=str)
def test_cached_equals_full_recompute(model, sizes):
    ids = token_ids()
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        steps = [forward(model, part, past_key_values=cache) for part in ids.split(sizes, dim=1)]
        assert close(torch.cat(steps, 1), forward(model, ids, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}, {"num_return_sequences": 2}])
def test_generation_with_and_without_cache(model, options):
    several = {"num_beams": 3} if "num_return_sequences" in options else {}
    common = GREEDY | {"num_beams": options.get("num_beams", 1)} | several
    plain = {name: value for name, value in options.items() if name == "num_return_sequences"}
    expected = model.generate(token_ids(), use_cache=False, **common | plain)
    assert torch.equal(model.generate(token_ids(), **common | options), expected)


def test_left_padded_batch(model):
    ids = token_ids(1, 30)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids[:, :23]], 1)
    batch, mask = torch.cat([ids, padded]), torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[1, 30:], model.generate(ids[:, :23], **GREEDY)[0, 23:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_implementations_and_both_forms_agree(model, implementation, monkeypatch):
    ids, before = token_ids(), model.config._attn_implementation
    expected = forward(model, ids, use_cache=False)
    model.set_attn_implementation(implementation)
    sliding = any(not layer.latent.exact_window for layer in converted_layers(model.config))
    tolerance = 1e-4 if sliding and implementation == "eager" else 1e-9  # its softmax is in float32
    try:
        for absorbs in (False, True):
            monkeypatch.setattr(ExactWindowAttention, "absorbs", lambda *_, absorbs=absorbs: absorbs)
            mask = torch.ones(2, 40, dtype=torch.long)
            mask[0, 0] = 0  # or sdpa gets no mask
            assert close(forward(model, ids, attention_mask=mask)[1], expected[1], tolerance)
    finally:
        model.set_attn_implementation(before)


def test_decode_never_expands_the_cache(model, monkeypatch):
    ids, cache = token_ids(), DynamicCache(config=model.config)
    forward(model, ids[:, :30], past_key_values=cache)

    def refuse(*args):
        raise AssertionError("the latent was expanded in a decode step")

    monkeypatch.setattr(ExactWindowAttention, "expand_kv", refuse)
    windowed = [m for m in model.modules() if isinstance(m, ExactWindowAttention)]
    assert windowed
    forward(model, ids[:, 30:31], past_key_values=cache)


def has_sliding_layers(model):
    return any(not layer.latent.exact_window for layer in converted_layers(model.config))


def test_crop_until_the_window_is_full_or_recorded(model):
    if has_sliding_layers(model):
        pytest.skip("transformers does not crop sliding-window caches")
    ids, cache = token_ids(), DynamicCache(config=model.config)
    expected = forward(model, ids, use_cache=False)
    forward(model, ids[:, :5], past_key_values=cache)
    cache.crop(-3)
    assert close(forward(model, ids[:, 2:30], past_key_values=cache), expected[:, 2:30])
    with pytest.raises((RuntimeError, ValueError), match="sliding"):
        cache.crop(-1)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_decoding(model, how):
    """Tokens that were guessed wrong leave the cache again, exact ones included."""
    if how == "assistant" and has_sliding_layers(model) and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers before 5.18 fails with an assistant of sliding windows (huggingface#48280)")
    ids = token_ids(1).repeat(1, 2)  # so that there is something to look up
    options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": model}
    assert torch.equal(model.generate(ids, **GREEDY | options), model.generate(ids, **GREEDY))


def test_an_offloaded_layer_keeps_its_exact_tokens(model):
    """DynamicCache offloads a layer as soon as it was updated, before the attention goes on."""
    layer, given = ExactWindowLayer(WINDOW), tuple(torch.randn(1, 2, 9, 4) for _ in range(2))
    layer.update(torch.randn(1, 1, 9, 3), torch.randn(1, 1, 9, 2), given)
    layer.offload()
    layer.prefetch()
    new = tuple(torch.randn(1, 2, 1, 4) for _ in range(2))
    _, exact = layer.update(torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 2), new)
    for seen, before, last in zip(exact, given, new, strict=True):
        assert torch.equal(seen, torch.cat([before[:, :, -WINDOW + 1 :], last], 2))


def test_static_cache_is_refused_by_name(model):
    with pytest.raises(NotImplementedError, match=r"exact window of 6 tokens needs a DynamicCache, got a Static"):
        forward(model, token_ids(), past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_cache_holds_latent_rope_key_and_a_window(model):
    cache = DynamicCache(config=model.config)
    forward(model, token_ids(), past_key_values=cache)
    windows = 0
    for layer, described in zip(cache.layers, converted_layers(model.config), strict=True):
        groups, head_dim = described.attention.num_kv_heads, described.attention.head_dim
        assert layer.keys.shape[-1] + layer.values.shape[-1] == groups * head_dim
        if described.latent.exact_window:
            assert layer.exact.keys.shape == layer.exact.values.shape == (2, groups, WINDOW - 1, head_dim)
            windows += layer.exact.keys[0].nbytes + layer.exact.values[0].nbytes
    assert measure(model).cache_bytes_once == windows > 0


def test_report_plan_and_eval_agree_on_bytes(tmp_path, source):
    plan = anymla.plan(source, kv_cache=0.5, exact_window=WINDOW, **FAST)
    planned = anymla.explain_plan(plan)["exact_window_bytes"]
    report = anymla.convert(source, tmp_path / "out", plan)
    scores = anymla.evaluate(tmp_path / "out", TRAIN, tokens=600, length=64)
    assert planned == report.after.cache_window_bytes == scores.cache_window_bytes > 0
    assert report.before.cache_window_bytes == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"last {WINDOW} tokens" in card and "anymla export" not in card and "--exact-window 6" in card


def test_planned_parameters_are_those_of_the_model(tmp_path, source):
    found = converted(tmp_path, source, kv_cache=0.5)
    layers = anymla.explain_plan(anymla.MLAPlan.read(tmp_path / "out" / "plan.yaml"))["layers"]
    for layer, described in zip(layers, converted_layers(found.config), strict=True):
        module = found.get_submodule(described.module)
        tensors = [*module.parameters(), *module.buffers()]
        assert layer["parameters"]["after"] == pytest.approx(sum(tensor.numel() for tensor in tensors), rel=0.03)


def test_loads_without_anymla(tmp_path, source, without_anymla):
    expected = forward(converted(tmp_path, source, kv_cache=0.5), token_ids(), use_cache=False)
    assert close(without_anymla.logits(tmp_path / "out", {"input_ids": token_ids()}), expected)


@pytest.mark.parametrize("bias", [0.0, 20.0])
def test_half_precision_stays_close(tmp_path, bias):
    """To what float64 gives: as close as without a window, also where keys have a large constant part."""
    exact = make_model("qwen2", torch.float64, head_dim=8)
    for layer in exact.model.layers:
        layer.self_attn.k_proj.bias.data += bias * torch.sign(layer.self_attn.k_proj.bias.data)
    source, ids = save_model(exact, tmp_path / "source"), token_ids()
    for dtype in ("bfloat16", "float16"):
        lost = {}
        for window in (0, WINDOW):
            expected = forward(converted(tmp_path, source, kv_cache=0.5, exact_window=window), ids, use_cache=False)
            low, cache = load_model(tmp_path / "out", dtype=dtype), DynamicCache()
            steps = [forward(low, part, past_key_values=cache) for part in ids.split([30, *[1] * 10], dim=1)]
            full = forward(low, ids, use_cache=False)
            lost[window] = [(found.double() - expected).abs().mean() for found in (full, torch.cat(steps, 1))]
        assert max(lost[WINDOW]) < 1.5 * max(lost[0]), (dtype, lost)


@pytest.mark.slow
def test_window_beats_a_wider_latent_at_equal_bytes(tmp_path):
    """On a truly trained model, in contexts of 256 tokens: 1/8 of the cache as latents, and as 16 tokens with 1/16."""
    common = {"calibration": TRAIN, "calibration_tokens": 8192, "calibration_length": 256, "reconstruction_steps": 40}
    found = {}
    for name, changes in (("latent", {"kv_cache": 0.125}), ("window", {"kv_cache": 0.0625, "exact_window": 16})):
        anymla.convert(BUNDLED, tmp_path / name, **common, **changes)
        found[name] = anymla.evaluate(tmp_path / name, VALID, BUNDLED, tokens=8192, length=256)
    sizes = {name: 256 * score.cache_bytes_per_token + score.cache_window_bytes for name, score in found.items()}
    assert sizes["latent"] - sizes["window"] == 1280  # of 16 tokens, the newest is never held
    assert found["window"].kl < 0.35 * found["latent"].kl
    assert found["window"].perplexity < found["latent"].perplexity


@pytest.mark.slow
def test_tuning_a_windowed_model(tmp_path):
    anymla.convert(
        BUNDLED,
        tmp_path / "out",
        kv_cache=0.0625,
        exact_window=8,
        calibration=TRAIN,
        **FAST | {"reconstruction_steps": 0},
    )
    report = anymla.tune(tmp_path / "out", tmp_path / "tuned", teacher=BUNDLED, data=[str(TRAIN)], **TUNING)
    assert report.after.kl < 0.95 * report.before.kl
    described = layers_of(json.loads((tmp_path / "tuned" / "config.json").read_text()))
    assert all(layer.latent.exact_window == 8 for layer in described)


# --- What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "vllm"}, "--exact-window is for transformers only: --target vllm"),
        ({"exact_window": 33}, "--exact-window 33 needs calibration windows of at least 66 tokens"),
        ({"exact_window": -1}, "exact_window"),
        ({"exact_window": 1}, "--exact-window 1 would keep nothing"),
    ],
)
def test_refused_settings(source, settings, message):
    with pytest.raises(AnymlaError, match=message):
        anymla.plan(source, **FAST | {"exact_window": WINDOW} | settings)


def test_refused_models(tmp_path):
    models = {
        "all its layers have a sliding window": make_model("mistral", torch.float32, sliding_window=12),
        "its layers attend in chunks": tiny_model("llama4_text"),
        "a cache of its own kind": tiny_model("falcon_h1"),
    }
    for number, (reason, model) in enumerate(models.items()):
        source = save_model(model, tmp_path / str(number))
        with pytest.raises(AnymlaError, match=f"--exact-window cannot be for .*{reason}"):
            anymla.plan(source, exact_window=WINDOW)


@pytest.mark.parametrize("target", ["deepseek", "vllm", "gguf"])
def test_exports_refuse_it(tmp_path, source, target):
    converted(tmp_path, source, kv_cache=0.5, dtype="float32")
    with pytest.raises(AnymlaError, match=r"last 6 tokens' own keys and values.*without --exact-window"):
        anymla.export(tmp_path / "out", tmp_path / "export", target)
    assert not (tmp_path / "export").exists()

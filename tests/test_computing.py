"""The dtype of computation is what the machine does fast; the checkpoint's stays that of the output."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.evaluation.generation import stream_continuation
from anymla.evaluation.scores import score_model
from anymla.io import computing
from anymla.io.checkpoint import load_tokenizer
from anymla.io.computing import load_to_compute
from anymla.io.streamed import StreamedModel
from anymla.sweep.layer import CalibrationSplit
from tests.damage import run_main
from tests.families import FAST, logits, make_model, save_model, token_ids

SETTINGS = {"kv_cache": 0.5, **FAST}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture
def machine(monkeypatch):
    """Lets 16-bit products take so many times as long as those in float32."""
    return lambda times: monkeypatch.setattr(computing, "slowdown", lambda dtype: times)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def stories(request, tmp_path):
    """The bundled model in 16 bits."""
    return save_model(AutoModelForCausalLM.from_pretrained(bundled_model()).to(request.param), tmp_path / "stories")


def noise(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_the_measurement_takes_milliseconds_and_is_a_ratio():
    assert 0.05 < computing.slowdown("bfloat16") < 100
    assert computing.slowdown("bfloat16") == computing.slowdown("bfloat16")


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_choice(machine, stored):
    machine(6.0)
    assert computing.computing_dtype(stored, "cpu").dtype == "float32"
    assert "6.0 times" in computing.computing_dtype(stored, "cpu").reason
    assert computing.computing_dtype(stored, "cuda").dtype == stored
    assert computing.computing_dtype(stored, "cpu", stored).dtype == stored
    assert computing.computing_dtype("float64", "cpu").dtype == "float64"
    machine(1.2)
    assert computing.computing_dtype(stored, "cpu").dtype == stored


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_keeps_the_checkpoints_dtype(tmp_path, machine, family, stored):
    source = save_model(make_model(family, torch.float32, **FAMILIES[family]).to(stored), tmp_path / "source")
    machine(6.0)
    report = anymla.convert(source, tmp_path / "out", **SETTINGS)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {stored}
    outside = [name for name in before if "self_attn" not in name]
    assert all(torch.equal(before[name], after[name]) for name in outside) and len(outside) >= 12
    name = str(stored).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert (report.computing.dtype, report.computing.stored) == ("float32", name)
    assert report.to_dict()["computing"]["reason"] == report.computing.reason
    whole = AutoModelForCausalLM.from_pretrained(source).config
    numbers = 2 * 2 * whole.num_key_value_heads * getattr(whole, "head_dim", 8) if family == "qwen3" else 2 * 2 * 3 * 8
    assert report.before.cache_bytes_per_token == numbers * 2


def test_within_rounding_of_a_conversion_in_the_checkpoints_dtype(stories, tmp_path, machine):
    models = {}
    for times in (6.0, 1.0):
        machine(times)
        report = anymla.convert(stories, tmp_path / str(times), rope_dims=8, **SETTINGS)
        models[times] = AutoModelForCausalLM.from_pretrained(tmp_path / str(times), dtype="float32").eval()
        assert report.computing.dtype == ("float32" if times > 2 else report.computing.stored)
    kind = AutoModelForCausalLM.from_pretrained(stories).dtype
    original, ids = AutoModelForCausalLM.from_pretrained(stories, dtype="float32").eval(), token_ids(4, 64)
    rounded = noise(logits(original.to(kind), ids).float(), logits(original.float(), ids))
    assert noise(logits(models[6.0], ids), logits(models[1.0], ids)) < 8 * rounded


def test_where_16_bits_are_fast_all_is_as_with_dtype(stories, tmp_path, machine):
    machine(1.0)
    anymla.convert(stories, tmp_path / "default", **SETTINGS)
    name = json.loads((stories / "config.json").read_text())["dtype"]
    machine(6.0)
    report = anymla.convert(stories, tmp_path / "asked", dtype=name, **SETTINGS)
    assert report.computing.dtype == name
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("default", "asked"))
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in one | other)


def test_what_is_scored_is_what_is_saved(stories, tmp_path, machine):
    """The held-out scores of the report are those of the saved weights in float32."""
    machine(6.0)
    report = anymla.convert(stories, tmp_path / "out", **SETTINGS)
    tokens = {"tokens": FAST["calibration_tokens"], "length": FAST["calibration_length"], "seed": 0}
    windows = calibration_windows(bundled_text("train"), load_tokenizer(stories), **tokens)
    held_out = windows[CalibrationSplit.of(len(windows)).held_out]
    scores = score_model(load_to_compute(tmp_path / "out"), held_out, load_to_compute(stories))
    assert scores.cache_bytes_per_token == report.after.cache_bytes_per_token
    assert (scores.kl, scores.perplexity) == pytest.approx((report.after.kl, report.after.perplexity), rel=1e-3)


def test_a_tensor_stored_wider_is_rounded_as_transformers_does(tmp_path, machine):
    model = make_model("llama", torch.float32)
    model.config.dtype = torch.bfloat16
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    source = StreamedModel(tmp_path, dtype=None, device="cpu")
    source.compute_in("float32")
    layer = source.model.model.layers[0]
    with source.layer(layer):
        found = layer.mlp.up_proj.weight.detach().clone()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").model.layers[0].mlp.up_proj.weight
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())
    assert torch.equal(source.as_saved("model.layers.0.mlp.up_proj.weight", found), expected)


def test_a_stopped_conversion_goes_on_in_its_dtype(stories, tmp_path, machine):
    def stop(done, total, result):
        if done == 2:
            raise KeyboardInterrupt

    machine(6.0)
    anymla.convert(stories, tmp_path / "whole", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        anymla.convert(stories, tmp_path / "out", progress=stop, **SETTINGS)
    machine(1.0)
    report = anymla.convert(stories, tmp_path / "out", **SETTINGS)
    assert report.computing.dtype == "float32" and "6.0 times" in report.computing.reason
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_evaluation_in_both(stories, tmp_path, machine):
    found = {}
    for times in (6.0, 1.0):
        machine(times)
        evaluation = anymla.evaluate(
            stories, bundled_text("valid"), bundled_model(), benchmarks=anymla.Benchmarks(), tokens=2048, length=128
        )
        found[times] = evaluation.scores
        stored = json.loads((stories / "config.json").read_text())["dtype"]
        assert evaluation.settings["dtype"] == ("float32" if times > 2 else stored)
        assert evaluation.settings["checkpoint_dtype"] == stored
    assert found[6.0].cache_bytes_per_token == found[1.0].cache_bytes_per_token
    assert found[6.0].perplexity == pytest.approx(found[1.0].perplexity, rel=0.01)
    assert found[6.0].kl < found[1.0].kl * 2


def test_the_commands_say_it(stories, tmp_path, machine, monkeypatch, capfd):
    machine(6.0)
    options = ["--calibration-tokens", "1024", "--calibration-length", "64", "--reconstruction-steps", "0"]
    done = run_main(["convert", str(stories), "-o", str(tmp_path / "out"), *options], monkeypatch, capfd)
    assert done.code == 0 and "note: computed in float32, saved in " in done.err, done.err
    text = ["--text", str(bundled_text("valid")), "--tokens", "512"]
    done = run_main(["eval", str(tmp_path / "out"), *text], monkeypatch, capfd)
    assert done.code == 0 and "note: computed in float32" in done.err and "cache bytes are those of" in done.err


def test_generates(stories, machine, capfd):
    machine(6.0)
    settings = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0, "device": "cpu", "dtype": None}
    stream_continuation(str(stories), "Once upon a time", **settings)
    assert capfd.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize("times", [6.0, 1.0])
def test_an_original_in_16_bits_teaches_in_either(stories, tmp_path, machine, times):
    machine(times)
    anymla.convert(stories, tmp_path / "converted", **SETTINGS)
    data = {"data": str(bundled_text("train")), "eval_data": str(bundled_text("valid")), "device": "cpu"}
    sizes = {"tokens": 256, "length": 64, "eval_tokens": 256, "layerwise": 0.5, "learning_rate": 1e-4}
    report = anymla.tune(tmp_path / "converted", tmp_path / "tuned", teacher=stories, **data, **sizes)
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    stored = getattr(torch, json.loads((stories / "config.json").read_text())["dtype"])
    assert {tensor.dtype for tensor in tuned.values() if tensor.is_floating_point()} == {stored}
    assert report.after.kl == pytest.approx(report.before.kl, rel=0.2)

"""Weights as packed integers: sizes, order by bits, what loads them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import anymla
from anymla.account import measure
from anymla.errors import AnymlaError, CheckpointError, UnsupportedModelError
from anymla.io.sources.locate import locate
from anymla.layouts import TARGETS
from anymla.methods.base import method_of
from anymla.methods.tune import Tune
from anymla.modeling.packing import Packing
from anymla.run_outcome import source_spec
from anymla.training.pair_checks import check_pair
from tests.damage import VALID
from tests.families import FAST, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.method_contract import files, load, logits
from tests.test_methods import FAST_RUN, SAMPLES

HALF = {"mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 0}}
STEPS = {"rtn": {}, "hqq": {}, "gptq": FAST_RUN}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny model, stock and converted."""
    folder = tmp_path_factory.mktemp("integers")
    stock = save_model(make_model("llama", torch.float32), folder / "stock")
    anymla.run(stock, folder / "converted", steps=[HALF])
    return {"stock": stock, "converted": folder / "converted"}


def packed(source, output, name, bits, group=16):
    anymla.run(source, output, steps=[{name: {"bits": bits, "group": group, **STEPS[name]}}])
    return output


def kl(found, original):
    return (original.softmax(-1) * (original.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["stock", "converted"])
@pytest.mark.parametrize("name", STEPS)
def test_fewer_bits_lose_more_and_files_are_as_small_as_counted(sources, name, kind, tmp_path):
    original, losses, sizes = logits(load(sources[kind]), token_ids()), [], []
    for bits in (8, 4, 3, 2):
        folder = packed(sources[kind], tmp_path / str(bits), name, bits)
        losses.append(kl(logits(load(folder), token_ids()), original))
        sizes.append(json.loads((folder / "account.json").read_text())["weight_bytes"])
        tensors = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
        assert sizes[-1] == pytest.approx(tensors, rel=0.01)
        header = (folder / "model.safetensors").stat().st_size - tensors  # names and shapes, of a few kB of weights
        assert header < 8192
    assert losses == sorted(losses) and losses[0] < 0.1 * losses[-1]
    assert sizes == sorted(sizes, reverse=True)


def test_what_makes_the_cache_keeps_its_bits(sources, tmp_path):
    """Stock keys and values get four bits; a converted attention packs queries and output alone."""
    stock = load_file(packed(sources["stock"], tmp_path / "stock", "rtn", 2) / "model.safetensors")
    converted = load_file(packed(sources["converted"], tmp_path / "converted", "rtn", 2) / "model.safetensors")
    place = "model.layers.1.self_attn"
    words = {name: stock[f"{place}.{name}.weight_packed"].shape[1] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert words == {"q_proj": 3, "k_proj": 6, "v_proj": 6, "o_proj": 3}  # of 48 inputs
    kept = {name.removeprefix(f"{place}.") for name in converted if name.startswith(place) and name.endswith(".weight")}
    assert kept == {"kv_a_proj_with_mqa.weight", "kv_b_proj.weight"}


def test_gptq_makes_up_for_its_errors(tmp_path):
    """On the inputs that it saw, with the same scales, less of the output is lost than by rounding to nearest."""
    from anymla.methods.integers.gptq import compensated
    from anymla.methods.integers.rtn import largest_scale

    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 64) / 8, torch.randn(512, 8) @ torch.randn(8, 64) + torch.randn(512, 64) / 10
    scale = largest_scale(weight, 3, 16)
    spread = scale.repeat_interleave(16, dim=1)
    nearest = (weight / spread).round().clamp(-4, 3) * spread
    made = compensated(weight, inputs.T @ inputs / 512, scale, bits=3, damping=0.01)
    assert ((made / spread) - (made / spread).round()).abs().max() < 1e-4

    def lost(other):
        return (inputs @ (weight - other).T).square().mean()

    assert lost(made) < 0.5 * lost(nearest)


@pytest.mark.parametrize("kind", ["stock", "converted"])
def test_the_output_is_read_everywhere(sources, kind, tmp_path, without_anymla):
    """By eval and generate; without anymla by its own files or as a stock model."""
    folder = packed(sources[kind], tmp_path / "out", "hqq", 4)
    expected = logits(load(folder), token_ids())
    assert torch.equal(without_anymla.logits(folder, {"input_ids": token_ids()}).double(), expected)
    scores = anymla.evaluate(folder, VALID, sources[kind], tokens=256, length=64)
    assert 0 < scores.kl < 1


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma2"])
def test_families_with_other_projections(family, tmp_path):
    source = save_model(tiny_model(family, torch.float32), tmp_path / "source")
    folder = packed(source, tmp_path / "out", "rtn", 8)
    assert kl(logits(load(folder), token_ids()), logits(load(source), token_ids())) < 0.01


def test_refusals_come_before_weights(sources, tmp_path, monkeypatch):
    def refused(*steps, model=sources["stock"]):
        with pytest.raises(AnymlaError) as error:
            anymla.run(model, tmp_path / "out", steps=list(steps))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    for family, reason in (("gpt2", "no linear layers"), ("mixtral", "experts")):
        save_model(tiny_model(family), tmp_path / family)
        assert reason in refused({"rtn": {"group": 16}}, model=tmp_path / family)
    assert "groups of 64 do not divide 48 inputs: give group 16" in refused("rtn")
    assert "comes before CACHE" in refused("kvquant", {"rtn": {"group": 16}})
    assert "they do not go together" in refused({"rtn": {"group": 16}}, {"hqq": {"group": 16}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'anymla[gptq]'" in str(method_of("gptq", {"group": 16}).refuses(_spec(sources["stock"])))


def _spec(folder):
    from anymla.architectures.model_spec import read_config, spec_of

    return spec_of(read_config(folder))


@pytest.mark.parametrize("before", [(), (HALF,)], ids=["stock", "converted"])
def test_a_coded_cache_leaves_weights_packed(sources, before, tmp_path):
    """What the step that codes the cache does not change is in the files as it was; bytes are counted so."""
    steps = [*before, {"hqq": {"bits": 3, "group": 16}}, {"kvquant": {"bits": 3, **FAST_RUN}}]
    anymla.run(sources["stock"], tmp_path / "out", steps=steps, keep_steps=True)
    weights = load_file(tmp_path / "out-steps" / f"step-{len(steps) - 1}-hqq" / "model.safetensors")
    coded = load_file(tmp_path / "out" / "model.safetensors")
    packed_before = {name for name in weights if name.endswith("_packed")}
    assert {name for name in coded if name.endswith("_packed")} == packed_before
    assert all(torch.equal(coded[name], weights[name]) for name in packed_before)
    told = json.loads((tmp_path / "out" / "account.json").read_text())
    live = measure(load(tmp_path / "out"))
    assert told["weight_bytes"] == told["measured"]["weight_bytes"] == live.weight_bytes
    assert told["cache_bytes_per_token"] == live.cache_bytes_per_token


def test_what_would_unpack_weights_refuses_them(sources, tmp_path):
    """All steps but those that code the cache, and mla, which reads quantised weights as plain ones and says so."""
    folder = packed(sources["stock"], tmp_path / "packed", "rtn", 4)
    spec = source_spec(locate(folder))
    assert all(layer.integers == Packing(bits=4, group=16) for layer in spec.layers)
    for name in ("mka", "saap", "kv_heads", "lorc", "billm", "rtn", "hqq", "gptq"):
        settings = {"group": 16} if name in STEPS else SAMPLES[name].settings
        with pytest.raises(UnsupportedModelError, match="weights are packed"):
            anymla.run(folder, tmp_path / "out", steps=[{name: settings}])
    plans = anymla.Recipe.of({"model": str(folder), "steps": [HALF, {"rtn": {"group": 16}}]}).plan(spec)
    assert plans[0].layers[0].integers is None and plans[1].layers[0].integers is not None
    with pytest.raises(CheckpointError, match="packed weights, which do not learn"):
        check_pair(folder, sources["stock"], Tune())
    with pytest.raises(CheckpointError, match="packed weights, which do not learn"):
        check_pair(packed(sources["converted"], tmp_path / "latent", "rtn", 4), sources["stock"], Tune())
    assert not (tmp_path / "out").exists()


def test_a_cache_step_that_was_stopped_writes_the_same(sources, tmp_path):
    """Also in config.json, where layers that were done before are named as they are now."""
    folder = packed(sources["stock"], tmp_path / "packed", "rtn", 4)
    steps = [{"transform_coding": {"kv_cache": 0.5, **FAST_RUN}}]

    def stop(number, step, done=0, layers=0, result=None):
        if result is not None:
            raise KeyboardInterrupt

    anymla.run(folder, tmp_path / "whole", steps=steps)
    with pytest.raises(KeyboardInterrupt):
        anymla.run(folder, tmp_path / "out", steps=steps, progress=stop)
    anymla.run(folder, tmp_path / "out", steps=steps)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "out"), token_ids()), logits(load(tmp_path / "whole"), token_ids()))


def test_a_cache_step_in_another_dtype_leaves_weights_packed(tmp_path):
    source = save_model(make_model("llama", torch.bfloat16), tmp_path / "source")
    steps = [{"rtn": {"group": 16}}, {"kvquant": {"bits": 3, "dtype": "float32", **FAST_RUN}}]
    anymla.run(source, tmp_path / "out", steps=steps, keep_steps=True)
    before = load_file(tmp_path / "out-steps" / "step-1-rtn" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in before if name.endswith("_packed")} == {name for name in after if name.endswith("_packed")}


def test_bits_are_counted_from_the_files(sources, tmp_path):
    folder = packed(sources["stock"], tmp_path / "out", "rtn", 4)
    stored = load_file(folder / "model.safetensors")
    parts = [tensor for name, tensor in stored.items() if ".weight_" in name]
    numbers = sum(tensor.prod().item() for name, tensor in stored.items() if name.endswith("weight_shape"))
    told = json.loads((folder / "run.json").read_text())["steps"][0]["account"]["bits_per_weight"]
    assert told == 8 * sum(tensor.nbytes for tensor in parts) / numbers
    assert 4 + 32 / 16 < told < 6.5
    done = anymla.compare([sources["stock"], folder], VALID, tokens=256, length=64)
    assert [model.account.bits_per_weight for model in done.models] == [None, told]


def test_no_export_is_offered_or_made(sources, tmp_path):
    folder = packed(sources["converted"], tmp_path / "out", "rtn", 4)
    assert "anymla export" in (sources["converted"] / "report.html").read_text()
    assert "anymla export" not in (folder / "report.html").read_text()
    for target in TARGETS:
        with pytest.raises(UnsupportedModelError, match="weights are packed"):
            anymla.export(folder, tmp_path / target, target)

"""Widths per layer, which the step `saap` gives: their bytes, how they load, what follows, which layers stay whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anymla
from anymla.architectures.model_spec import read_config, read_model_spec, spec_of
from anymla.errors import AnymlaError
from anymla.methods.base import method_of
from anymla.methods.saap import SAAP
from anymla.methods.saap.allocation import allocated, of_scores
from anymla.model_run.stream import decoder_layers
from tests.families import FAST, make_model, save_model, token_ids
from tests.families import logits as logits_of
from tests.family_models import tiny_config, tiny_model
from tests.method_contract import Case, Sample, a_killed_run_goes_on_to_the_same_bytes, all_ways_of_reading_agree
from tests.test_methods import SAMPLES
from tests.test_saap import TEXT, WHOLE, Held


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A model of which some layers need their neurons and heads more, made narrower in three ways."""
    model = make_model("llama", torch.float32, num_hidden_layers=3)
    for index, block in enumerate(decoder_layers(model)):
        for linear in (block.mlp.down_proj, block.self_attn.o_proj):
            linear.weight.data *= 4.0 ** (index - 1)
    folder = tmp_path_factory.mktemp("spread")
    save_model(model, folder / "source")
    for allocation in ("uniform", "global", "fluctuation"):
        step = TEXT | {"neurons": 0.5, "heads": 0.7, "multiple": 8, "allocation": allocation}
        anymla.run(folder / "source", folder / allocation, steps=[{"saap": step}])
    return folder


def widths(folder):
    """Neurons and KV heads of every layer, from the tensors."""
    tensors = load_file(folder / "model.safetensors")
    names = (("mlp.up_proj", 1), ("self_attn.k_proj", 8))
    return [[len(tensors[f"model.layers.{at}.{name}.weight"]) // size for at in range(3)] for name, size in names]


def test_widths_of_layers_cost_what_uniform_ones_do(spread):
    found = {name: widths(spread / name) for name in ("uniform", "global", "fluctuation")}
    assert found["uniform"] == [[32] * 3, [2] * 3]
    assert all([sum(kind) for kind in each] == [96, 6] for each in found.values())
    assert found["global"][0] != [32] * 3 and found["global"] != found["fluctuation"]
    assert all(size % 8 == 0 and size >= 16 for each in found.values() for size in each[0])
    accounts = [json.loads((spread / name / "account.json").read_text()) for name in found]
    for name in ("weight_bytes", "cache_bytes_per_token"):
        assert len({account[name] for account in accounts} | {each["measured"][name] for each in accounts}) == 1


def test_widths_of_layers_load_without_anymla(spread, tmp_path, without_anymla):
    model = AutoModelForCausalLM.from_pretrained(spread / "global")
    assert type(model).__name__ == "AnymlaLlamaForCausalLM"
    assert [layer.mlp.down_proj.in_features for layer in decoder_layers(model)] == widths(spread / "global")[0]
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (spread / "global", tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    expected = logits_of(model, token_ids())
    found = without_anymla.logits(tmp_path / "again", {"input_ids": token_ids()})
    assert (found - expected).abs().max() < 1e-4


def test_what_follows_keeps_the_widths(spread, tmp_path):
    """mla takes the attention alone; exports, and steps that need equal layers, say why they cannot."""
    fast = FAST | {"reconstruction_steps": 0}
    anymla.run(spread / "global", tmp_path / "latent", steps=[{"mla": {"kv_cache": 0.5, **fast}}])
    assert widths_of(tmp_path / "latent") == widths_of(spread / "global")
    assert logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "latent"), token_ids()).isfinite().all()
    with pytest.raises(AnymlaError, match="its layers have widths of their own, and these layouts have one for all"):
        anymla.export(tmp_path / "latent", tmp_path / "export", to="deepseek")
    spec = spec_of(read_config(spread / "global"))
    for name, settings, reason in (
        ("saap", {}, "its layers have widths of their own already"),
        ("mka", {"remove": 1}, "remove layers before the step saap"),
        ("kv_heads", {"kv_heads": 1}, "its layers have different numbers of KV heads"),
        ("shared_attention", {"spans": [[1, 1]]}, "its layers have different numbers of heads"),
    ):
        assert reason in (method_of(name, settings).refuses(spec) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lorc", "mfa", "transform_coding", "kvquant", "billm", "rtn"])
def test_every_later_step_keeps_the_widths(name, spread, tmp_path):
    anymla.run(spread / "global", tmp_path / "out", steps=[{name: SAMPLES[name].settings}])
    assert widths_of(tmp_path / "out") == widths_of(spread / "global")
    assert logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), token_ids()).isfinite().all()


@pytest.mark.parametrize(
    "promise",
    [all_ways_of_reading_agree, pytest.param(a_killed_run_goes_on_to_the_same_bytes, marks=pytest.mark.slow)],
    ids=lambda promise: promise.__name__,
)
def test_widths_of_layers_keep_promises(promise, spread, tmp_path):
    step = TEXT | {"neurons": 0.5, "heads": 0.7, "multiple": 8, "allocation": "global"}
    promise(Case("saap", Sample(step, {}), spread / "source"), tmp_path)


def widths_of(folder):
    return [layer.width for layer in spec_of(read_config(folder)).layers]


def test_protected_layers_stay_whole():
    spec = read_model_spec(make_model("llama", num_hidden_layers=16).config.to_dict())
    plan = SAAP(neurons=0.5, multiple=8, allocation="global").plan(spec)
    kept = [spec.intermediate_size if each is None else each.kept["neurons"] for each in plan.choices]
    assert [index for index, width in enumerate(kept) if width == 64] == [0, 1, 15]  # an eighth, a sixteenth
    assert sum(kept) == 16 * 32 and max(kept[2:-1]) - min(kept[2:-1]) == 8
    assert plan.after.layers[0] == spec.layers[0] and plan.after.layers[2].width.neurons == kept[2]
    with pytest.raises(AnymlaError, match="lower protect_first or protect_last"):
        SAAP(neurons=0.5, multiple=8, protect_first=9).plan(spec)
    bamba = read_model_spec(tiny_model("bamba").config.to_dict())
    assert "makes all layers at once" in (SAAP(multiple=8, protect_last=1).refuses(bamba) or "")


def test_dense_layers_below_a_mixture_have_no_part_in_its_budget():
    spec = read_model_spec(tiny_config("dots1", num_hidden_layers=3, first_k_dense_replace=1).to_dict())
    worth = torch.arange(1.0, 1 + spec.routed_experts)
    facts = [{}, *({"experts.element": Held(scale * worth)} for scale in (1, 10))]
    plan = SAAP(**WHOLE | {"experts": 0.75, "allocation": "global"}).plan(spec, facts)
    assert [each and (each.kept, each.gone) for each in plan.choices] == [
        None,
        ({"experts": 2}, {"experts": [0, 1]}),
        None,
    ]
    plan = SAAP(**WHOLE | {"experts": 0.75, "protect_last": 1}).plan(spec, facts)
    assert [each and each.kept for each in plan.choices] == [None, {"experts": 2}, None]


def test_blocks_that_are_worth_most_are_kept():
    worths = [[9.0, 8.0, 1.0, 1.0], [7.0, 6.0, 5.0, 4.0], [3.0, 2.0, 0.5, 0.1]]
    assert allocated(worths, [1, 1, 1], 7, 1) == [2, 4, 1]
    assert allocated(worths, [2, 2, 2], 9, 2) == [2, 4, 2]  # of which one is left
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([100.0, 300.0, 200.0])]
    assert of_scores(scores, standardised=False) == [[3.0, 2.0, 1.0], [300.0, 200.0, 100.0]]
    first, second = of_scores(scores, standardised=True)
    assert first == pytest.approx(second) and sum(first) == pytest.approx(0, abs=1e-6)

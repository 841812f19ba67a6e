"""Width pruning: removing is zeroing, scores find what is dead, and the result is a stock checkpoint.

Figures on the bundled model (stories260K, 172 FFN neurons): KL in nats per token with 80 and 60 % of the neurons. fused
0.87 and 2.15, element 0.78 and 1.97, vector 0.93 and 2.16, magnitude 1.18 and 2.10, random 1.10 and 2.32.
"""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_config, read_model_spec, spec_of
from anymla.architectures.parts import attention_path
from anymla.architectures.stock_config import config_after, own_width
from anymla.architectures.vision import VISION
from anymla.errors import AnymlaError
from anymla.methods.base import method_of
from anymla.methods.saap import SAAP
from anymla.methods.saap.build import shrink
from anymla.methods.saap.scores import MagnitudeSurvey, TaylorSurvey
from anymla.methods.saap.settings import KINDS
from anymla.methods.saap.structures import members
from anymla.model_run.stream import decoder_layers
from anymla.register import converted_class
from anymla.sweep.checkpoint import converted_config
from tests.damage import TRAIN, VALID
from tests.families import FAST, make_model, save_model, token_ids
from tests.families import logits as logits_of
from tests.family_models import tiny_model
from tests.precision import Exact
from tests.vision_models import tiny_vision_config, tiny_vision_model

WHOLE = dict.fromkeys(KINDS, 1.0)
RANDOM = {"multiple": 8, "importance": "random"}
TEXT = {"calibration_tokens": 1024, "calibration_length": 64}
SOME = ("llama", "qwen2", "gemma3_text", "phi3", "cohere", "gpt_oss", "starcoder2", "gpt2", "opt", "afmoe", "lfm3")
MIXTURES = ("mixtral", "gpt_oss", "ernie4_5_moe")


def families(*fast):
    """All families that the installed transformers has, those that are not ``fast`` marked as slow."""
    names = [name for name, family in FAMILIES.items() if not family.inside and name in CONFIG_MAPPING]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@dataclass
class Held:
    """A tensor of facts, as one in a file."""

    tensor: torch.Tensor

    def read(self):
        return self.tensor


def layers_of(model, spec, plan=None):
    """The layers as a sweep hands them to the method."""
    names = {module: name for name, module in model.named_modules()}
    for index, block in enumerate(decoder_layers(model)):
        path = "self_attn" if spec.layers[index].latent is not None else attention_path(block)
        planned = SimpleNamespace(planned=None, choice=None, new_config=None)
        if plan is not None:
            planned.planned, planned.choice = plan.after.layers[index], plan.choices[index]
            planned.new_config = config_after(model.config, spec, plan.after).get_text_config()
        yield SimpleNamespace(
            index=index,
            name=names[block],
            config=model.config.get_text_config(),
            module=block,
            old=spec.layers[index],
            attention=None if path is None else block.get_submodule(path),
            attention_path=path,
            **vars(planned),
        )


def facts_of(model, kind, windows):
    """All importances of the structures of each layer, by autograd through the whole model."""
    layers = [*layers_of(model.requires_grad_(True), spec_of(model.config.to_dict()))]
    observers = [TaylorSurvey([kind]).observer(layer) for layer in layers]
    for window in windows:
        model.zero_grad()
        cross_entropy(model(input_ids=window[None], use_cache=False).logits[0, :-1], window[1:]).backward()
        for observer in observers:
            observer.add(None)
    model.zero_grad()
    with torch.no_grad():
        scores = [
            each.scores() | MagnitudeSurvey([kind]).layer(layer, None)
            for each, layer in zip(observers, layers, strict=True)
        ]
    model.requires_grad_(False)
    return [{name: Held(tensor) for name, tensor in fact.items()} for fact in scores]


def zeroed(model, plan):
    """A copy with all numbers of the structures that go set to zero."""
    found = copy.deepcopy(model)
    for layer in layers_of(found, spec_of(model.config.to_dict()), plan):
        for kind, gone in ({} if layer.choice is None else layer.choice.gone).items():
            for member in (each for each in members(kind, layer) if each.scored):
                layer.module.state_dict()[member.name].index_fill_(member.dim, member.places[gone].flatten(), 0)
    return found


def narrowed(model, plan):
    """The model without the structures that go, as transformers makes it of the new config."""
    shrunk, spec = copy.deepcopy(model), spec_of(model.config.to_dict())
    after = [*plan.after.layers]
    for layer in layers_of(shrunk, spec, plan):
        if layer.choice is not None:
            after[layer.index] = own_width(layer.config, layer.planned, layer.name)
            shrink(layer, after[layer.index], layer.choice.gone)
    config, kind = config_after(model.config, spec, plan.after), type(model)
    if not all(layer.stock for layer in after):
        config, kind = converted_config(model, config, tuple(after)), converted_class(kind.__name__)
    fresh = kind(config).to(model.dtype).eval()
    fresh.load_state_dict(shrunk.state_dict())
    return fresh


def same(model, other, tolerance=1e-5):
    with Exact() if model.dtype == torch.float64 else nullcontext():
        found, expected = logits_of(model, token_ids()), logits_of(other, token_ids())
    return (found - expected).abs().max().item() <= tolerance * expected.abs().max().item()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("saap") / "source")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The same with latent attention, and a model whose latent is made of keys that have a norm."""
    folder = tmp_path_factory.mktemp("latent")
    normed = save_model(make_model("qwen3", torch.float32), folder / "source")
    for family, model in (("llama", source), ("qwen3", normed)):
        anymla.run(model, folder / family, steps=[{"mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 0}}])
    return folder


@pytest.mark.parametrize("name", families(*SOME))
def test_removing_is_zeroing(name):
    """For neurons and heads of every family that has a config for it; the others are refused."""
    model = tiny_model(name)
    spec, family = read_model_spec(model.config.to_dict()), FAMILIES[name]
    tried = []
    for kind, share in (("neurons", 0.5), ("heads", 0.4)):
        method = SAAP(**WHOLE | RANDOM | {kind: share})
        if method.refuses(spec) is None:
            plan = method.plan(spec, [])
            assert same(narrowed(model, plan), zeroed(model, plan))
            tried.append(kind)
    assert ("neurons" in tried) == (family.fewer_neurons and not spec.experts)
    assert ("heads" in tried) <= family.says_kv_heads


@pytest.mark.parametrize("name", families("llama", "phi3", "gpt2", "gemma3_text"))
def test_removing_is_zeroing_where_one_layer_stays_whole(name):
    """For neurons and heads, in layers with widths of their own."""
    model = tiny_model(name)
    spec, tried = read_model_spec(model.config.to_dict()), 0
    for kind, share in (("neurons", 0.75), ("heads", 0.8)):
        method = SAAP(**WHOLE | RANDOM | {kind: share, "protect_first": 1})
        if method.refuses(spec) is None:
            plan = method.plan(spec, [])
            assert plan.after.layers[0].width is None
            assert same(narrowed(model, plan), zeroed(model, plan))
            tried += 1
    assert tried or spec.experts or SAAP(**WHOLE | {"neurons": 0.5, "protect_first": 1}).refuses(spec)


def test_heads_leave_a_fused_projection():
    """Phi-3's, without longrope, whose factors its config counts by hidden_size over heads."""
    model = tiny_model("phi3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    plan = SAAP(**WHOLE | RANDOM | {"heads": 0.4}).plan(read_model_spec(model.config.to_dict()), [])
    assert same(narrowed(model, plan), zeroed(model, plan))


@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("name", families(*MIXTURES))
def test_experts_that_are_removed_are_those_that_are_never_chosen(name, protected, monkeypatch):
    """Their router's scores set to minus infinity, and what is added to them where they are chosen."""
    model = tiny_model(name, torch.float32)  # as routers compute: they take their weight as it is
    spec = read_model_spec(model.config.to_dict())
    method = SAAP(**WHOLE | RANDOM | {"experts": 0.75, "protect_last": protected})
    if method.refuses(spec) is not None:
        assert not spec.routed_experts
        return
    plan, unchosen, rows = method.plan(spec, []), copy.deepcopy(model), {}
    for layer in layers_of(unchosen, spec, plan):
        for member in members("experts", layer) if layer.choice is not None else ():
            tensor, gone = layer.module.state_dict()[member.name], layer.choice.gone["experts"]
            if tensor.dim() == 2 and member.scored:
                rows[tensor.data_ptr()] = gone
            elif ".experts." not in member.name and "router.bias" not in member.name:
                tensor.index_fill_(member.dim, torch.tensor(gone), -torch.inf)
    assert rows or protected or name in ("flint", "nemotron_h")  # whose tiny models have no mixture
    plain, fresh = torch.nn.functional.linear, narrowed(model, plan)

    def linear(states, weight, bias=None):
        scores = plain(states, weight, bias)
        gone = rows.get(weight.data_ptr(), [])
        return scores.index_fill(-1, torch.tensor(gone), -torch.inf) if gone else scores

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert same(fresh, unchosen)


def test_a_mixture_with_fewer_experts_is_a_stock_model(tmp_path):
    source = save_model(tiny_model("mixtral", torch.float32), tmp_path / "source")
    anymla.run(source, tmp_path / "out", steps=[{"saap": WHOLE | TEXT | {"experts": 0.75}}])
    account = json.loads((tmp_path / "out" / "account.json").read_text())
    assert account["weight_bytes"] == account["measured"]["weight_bytes"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(model).__name__, model.config.num_local_experts) == ("MixtralForCausalLM", 3)
    assert logits_of(model, token_ids()).isfinite().all()


@pytest.mark.parametrize("kind", ["neurons", "heads", "latent"])
@pytest.mark.parametrize(("family", "protected"), [("llama", 0), ("llama", 1), ("qwen3", 0)])
def test_removing_is_zeroing_in_a_latent_attention(family, protected, kind, converted, tmp_path):
    converted = converted / family
    step, spec = WHOLE | RANDOM | TEXT | {kind: 0.5}, spec_of(read_config(converted))
    if protected:
        step |= {kind: 0.75, "multiple": 4, "protect_first": 1}
    if family == "qwen3" and kind == "heads":
        with pytest.raises(AnymlaError, match="made of true keys of all heads"):
            anymla.run(converted, tmp_path / "out", steps=[{"saap": step}])
        return
    anymla.run(converted, tmp_path / "out", steps=[{"saap": step}])
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(converted)
    assert same(after, zeroed(before, SAAP(**step).plan(spec, [])))
    costs = [
        json.loads((folder / "account.json").read_text())["cache_bytes_per_token"]
        for folder in (converted, tmp_path / "out")
    ]
    assert (costs[1] < costs[0]) == (kind == "latent")


@pytest.mark.parametrize(
    ("step", "reason"), [("lorc", "its cache is coded"), ("shared_attention", "share attention maps")]
)
def test_what_no_gradient_passes_is_refused(step, reason):
    settings = {"shared_attention": {"spans": [[1, 1]]}}.get(step, {})
    spec = method_of(step, settings).plan(read_model_spec(make_model("llama").config.to_dict())).after
    assert reason in (SAAP(multiple=8).refuses(spec) or "")


@pytest.mark.parametrize("kind", ["neurons", "heads", "latent"])
def test_dead_structures_are_found_first(kind, source, converted, tmp_path):
    """What nothing reads is removed, and the model computes what it did."""
    folder = converted / "llama" if kind == "latent" else source
    model, spec = AutoModelForCausalLM.from_pretrained(folder), spec_of(read_config(folder))
    share = {"neurons": 0.75, "heads": 0.67, "latent": 0.5}[kind]
    step = WHOLE | RANDOM | TEXT | {kind: share, "seed": 5}
    plan = SAAP(**step).plan(spec, [])
    for layer in layers_of(model, spec, plan):
        reader = next(each for each in members(kind, layer) if each.dim == 1)
        layer.module.state_dict()[reader.name].index_fill_(1, reader.places[layer.choice.gone[kind]].flatten(), 0)
    save_model(model, tmp_path / "planted")
    anymla.run(tmp_path / "planted", tmp_path / "out", steps=[{"saap": step | {"importance": "fused"}}])
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_nothing_to_remove_is_the_same_bytes(source, tmp_path):
    anymla.run(source, tmp_path / "out", steps=[{"saap": {"neurons": 1.0, **TEXT}}])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_left_is_tuned(source, tmp_path):
    tune = {"data": [str(TRAIN)], "eval_data": str(VALID), "eval_tokens": 256, "tokens": 2048, "length": 64, "batch": 4}
    for allocation, kind, settings in (
        ("uniform", "LlamaForCausalLM", {}),
        ("global", "AnymlaLlamaForCausalLM", {"train": "all", "learning_rate": 0.0005}),
    ):
        saap = {"neurons": 0.5, "multiple": 8, "allocation": allocation, **TEXT}
        out = tmp_path / allocation
        anymla.run(source, out, steps=[{"saap": saap}, {"tune": tune | settings | {"device": "cpu"}}])
        told = json.loads((out / "tuning.json").read_text())
        assert told["after"]["kl"] < told["before"]["kl"]
        assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == kind


def test_widths_are_near_what_was_asked_for():
    spec = read_model_spec(make_model("llama").config.to_dict())
    after = SAAP(neurons=0.6, heads=0.5, multiple=16).plan(spec).after
    assert (after.intermediate_size, {each.num_heads for each in after.attention_layers.values()}) == (32, {4})
    assert SAAP(neurons=0.99, multiple=16).plan(spec).after.intermediate_size == 48  # fewer, where some are to go
    assert SAAP(neurons=0.01, multiple=16).plan(spec).after.intermediate_size == 16  # never none
    with pytest.raises(AnymlaError, match=r"neurons 0.8: no fewer than its 64 can be kept: choose another multiple"):
        SAAP().plan(spec)
    odd = read_model_spec(make_model("llama", num_attention_heads=8, num_key_value_heads=8).config.to_dict())
    found = {SAAP(neurons=1.0, heads=share).plan(odd).choices[0].kept["heads"] for share in (0.3, 0.6, 0.9)}
    assert found == {2, 4, 6}  # 5 and 7 heads do not divide hidden_size 48, which Llama's config insists on


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("mixtral", {}, "neurons: its FFNs are mixtures of experts"),
        ("bitnet", {}, "neurons: no config of its family says another width, or a norm reads all of them"),
        ("olmo2", {"neurons": 1.0, "heads": 0.5}, "heads: no config of its family says fewer of the same size"),
        ("gpt2", {"neurons": 1.0, "heads": 0.5}, "heads: no config of its family says fewer of the same size"),
        ("phi3", {"neurons": 1.0, "heads": 0.5}, "heads: the length of its rope's factors"),
        ("llama", {"latent": 0.5}, "latent: it has no latent attention, which the step mla makes"),
    ],
)
def test_what_cannot_be_is_said_from_the_config(name, settings, reason):
    spec = read_model_spec(tiny_model(name).config.to_dict())
    assert reason in (SAAP(**settings).refuses(spec) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VISION if name != "llama4"])  # whose class takes no text alone
def test_removing_is_zeroing_in_a_vision_model(name):
    model = tiny_vision_model(name, torch.float64)
    spec = read_model_spec(model.config.to_dict())
    methods = (SAAP(**WHOLE | RANDOM | {kind: share}) for kind, share in (("neurons", 0.5), ("heads", 0.4)))
    plans = [method.plan(spec, []) for method in methods if method.refuses(spec) is None]
    assert plans or name == "idefics2" or spec.experts
    assert all(same(narrowed(model, plan), zeroed(model, plan)) for plan in plans)


def test_the_language_model_of_a_vision_model_gets_narrower():
    config = tiny_vision_config("llava")
    spec = read_model_spec(config.to_dict())
    made = config_after(config, spec, SAAP(neurons=0.5, heads=0.4, multiple=8).plan(spec).after)
    assert made.text_config.intermediate_size == 32 and made.vision_config == config.vision_config
    assert (made.text_config.num_attention_heads, made.text_config.head_dim) == (2, 8)

"""Shared attention maps together with mla: a shared layer caches a latent of its values alone, in both orders."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import anymla
from anymla.account import account
from anymla.architectures.model_spec import read_config, spec_of
from anymla.errors import AnymlaError
from anymla.methods.base import method_of
from anymla.methods.shared_attention.spans import is_met
from anymla.modeling.shared_latent import MapSourceLatentAttention, SharedLatentAttention
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.method_contract import (
    Case,
    Sample,
    account_is_what_is_measured,
    all_ways_of_reading_agree,
    saved_again_it_is_the_same,
)
from tests.precision import Exact
from tests.test_methods import FAST_RUN
from tests.test_shared_attention import twin_layers

MLA = {"mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 4}}
SHARE = {"shared_attention": {"spans": [[1, 2]], **FAST_RUN}}
ORDERS = {"shared first": [SHARE, MLA], "mla first": [MLA, SHARE]}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model of four layers."""
    model = make_model("llama", torch.float32, num_hidden_layers=4)
    return save_model(model, tmp_path_factory.mktemp("shared") / "source")


@pytest.fixture(scope="module", params=ORDERS)
def made(request, source, tmp_path_factory):
    """The steps before the last one, and where their model and the last one's are."""
    *before, last = ORDERS[request.param]
    ((name, settings),) = last.items()
    folder = tmp_path_factory.mktemp("made")
    return Case(name, Sample(settings, {}, before=tuple(before)), source).run(folder / "out").parent


def test_it_keeps_the_promises_of_a_method(made):
    case = Case("", Sample({}, {}), made)  # it ran already
    for promise in (all_ways_of_reading_agree, account_is_what_is_measured, saved_again_it_is_the_same):
        promise(case, made)


def test_shared_layers_cache_a_latent_of_values_alone(made):
    model = load(made / "out")
    kinds = [type(layer.self_attn) for layer in model.model.layers[:3]]
    assert kinds == [MapSourceLatentAttention, SharedLatentAttention, SharedLatentAttention]
    cache = model(input_ids=token_ids(), use_cache=True).past_key_values
    assert [bool(layer.values.shape[-1]) for layer in cache.layers] == [True, False, False, True]  # rope keys
    assert all(layer.keys.shape[1:2] == (1,) and layer.keys.shape[-1] < 24 for layer in cache.layers[1:3])
    names = {name for name, _ in model.model.layers[1].self_attn.named_parameters()}
    assert not any(part in name for name in names for part in ("q_proj", "k_proj", "kv_", "k_a"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_way_of_generating_agrees(made, implementation):
    model, ids = load(made / "out", attn_implementation=implementation), token_ids(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(ids, **options)
    static = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, past_key_values=static, **options), greedy)
    assert torch.equal(model.generate(ids, use_cache=False, **options), greedy)
    pad, mask = ids.new_zeros(2, 3), torch.ones(2, 15, dtype=torch.long)
    mask[:, :3] = 0
    padded = model.generate(torch.cat([pad, ids], 1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 3:], greedy)
    beams = [model.generate(ids, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)


def test_it_loads_without_anymla_and_learns(made):
    model = load(made / "out", trust_remote_code=True)
    assert torch.equal(logits(model, token_ids()), logits(load(made / "out"), token_ids()))
    model.train()
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    source, shared = (model.model.layers[index].self_attn for index in (0, 2))
    for weight in (source.q_proj.weight, source.kv_b_proj.weight, shared.v_a_proj.weight, shared.v_b_proj.weight):
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "phi"])  # soft-caps; norms over all heads; biases, partial rope
def test_a_full_budget_after_sharing_changes_nothing(family, tmp_path):
    changes = {"layer_types": ["full_attention"] * 2} if family == "gemma2" else {}
    source = save_model(tiny_model(family, torch.float64, **changes), tmp_path / "source")
    shared = {"shared_attention": SHARE["shared_attention"] | {"spans": [[1, 1]]}}
    anymla.run(source, tmp_path / "shared", steps=[shared])
    anymla.run(source, tmp_path / "out", steps=[shared, {"mla": {"kv_cache": 1.0, **FAST}}])
    with Exact():
        expected = logits(load(tmp_path / "shared"), token_ids())
        assert (logits(load(tmp_path / "out"), token_ids()) - expected).abs().max() < 1e-8 * expected.abs().max()


def test_sharing_after_a_full_budget_is_exact_where_layers_attend_alike(tmp_path):
    """A latent wider than the values becomes the values."""
    source = save_model(twin_layers(make_model("llama", torch.float64)), tmp_path / "source")
    shared = {"shared_attention": SHARE["shared_attention"] | {"spans": [[1, 1]]}}
    anymla.run(source, tmp_path / "out", steps=[{"mla": {"kv_cache": 1.0, **FAST}}, shared])
    before, after = load(source), load(tmp_path / "out")
    assert after.model.layers[1].self_attn.v_b_proj.in_features == 24
    assert torch.allclose(logits(after, token_ids()), logits(before, token_ids()), atol=1e-9)


def test_later_steps_run_over_it_a_layer_at_a_time(made, tmp_path):
    anymla.run(made / "out", tmp_path / "out", steps=[{"gptq": {"bits": 4, "group": 16, **FAST_RUN}}])
    assert logits(load(tmp_path / "out"), token_ids()).isfinite().all()
    for step, said in (("kvquant", "share attention maps"), ("mfa", "share attention maps")):
        with pytest.raises(AnymlaError, match=said):
            anymla.run(made / "out", tmp_path / "no", steps=[step])


def test_a_search_after_mla_counts_rope_keys(source, tmp_path):
    search = {"shared_attention": {"layers": 0, **FAST_RUN}}
    anymla.run(source, tmp_path / "mla", steps=[MLA])
    spec = spec_of(read_config(tmp_path / "mla"))
    planned = method_of("shared_attention", {"spans": [[1, 2]]}).plan(spec).after
    bytes_of = [account(each).cache_bytes_per_token for each in (spec, planned)]
    saved = sum(spec.layers[index].parts[1].qk_rope_head_dim for index in (1, 2))
    assert bytes_of[0] - bytes_of[1] == 4 * saved
    whole = sum(attention.cached_numbers for attention in spec.attention_layers.values())
    share = bytes_of[1] / 4 / whole
    assert is_met(spec, [1, 2], share) and not is_met(spec, [1], share)
    assert method_of("shared_attention", search["shared_attention"]).plan(spec).after == spec


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([SHARE, {"mla": {"target": "vllm"}}], "leave target out"),
        ([SHARE, {"mla": {"exact_window": 8}}], "leave exact_window out"),
        ([SHARE, {"mla": {"ranks": "linear"}}], "leave ranks out"),
        ([{"mla": {"exact_window": 8, **FAST}}, SHARE], "exact window, whose map"),
        ([MLA, {"shared_attention": SHARE["shared_attention"] | {"align_heads": True}}], "align_heads"),
    ],
)
def test_what_cannot_be_is_refused_before_weights(steps, message, source, tmp_path):
    with pytest.raises(AnymlaError, match=message) as caught:
        anymla.run(source, tmp_path / "out", steps=steps)
    assert "\n" not in str(caught.value) and "kept" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_latents_of_normalised_keys_cannot_be_shared(tmp_path):
    source = save_model(tiny_model("qwen3"), tmp_path / "source")
    with pytest.raises(AnymlaError, match="put it before mla"):
        anymla.run(source, tmp_path / "out", steps=[MLA, {"shared_attention": {"spans": [[1, 1]]}}])

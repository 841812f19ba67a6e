"""Codes after the steps lorc and mfa: bases change nothing, bytes add up, every way of generating agrees."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import anymla
from anymla.modeling.coded_attention import CodedAttention
from anymla.modeling.coded_latent import CodedMfaAttention
from anymla.modeling.modeling_anymla import attention_class
from tests.damage import VALID
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.method_contract import Case, Sample, account_is_what_is_measured, all_ways_of_reading_agree, logits
from tests.precision import Exact
from tests.test_methods import FAST_RUN, TINY

BEFORE = {
    "lorc": {"lorc": {"kv_cache": 0.6}},
    "lorc of two kinds": {"lorc": {"kv_cache": 0.75, "ranks": "linear"}},  # the first layer stays stock
    "mfa": {"mfa": {"kv_cache": 0.5, **FAST_RUN}},
    "mfa-kr": {"mfa": {"kv_cache": 0.5, "key_reuse": True, **FAST_RUN}},
}
CODES = {
    "kvquant": ({"bits": 3, **FAST_RUN}, {"bits": 16, **FAST_RUN}),
    "transform_coding": ({"kv_cache": 0.125, **FAST_RUN}, {"kv_cache": 1.0, **FAST_RUN}),
}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("after") / "source")


@pytest.mark.parametrize(
    ("before", "codes"),
    [
        ("lorc", "kvquant"),
        ("lorc of two kinds", "transform_coding"),
        ("mfa", "kvquant"),
        ("mfa", "transform_coding"),
        ("mfa-kr", "transform_coding"),
    ],
)
def test_it_keeps_the_promises_of_a_method(before, codes, source, tmp_path):
    case = Case(codes, Sample(*CODES[codes], before=(BEFORE[before],)), source)
    for promise in (all_ways_of_reading_agree, account_is_what_is_measured):
        promise(case, tmp_path)
    kind = CodedMfaAttention if "mfa" in before else CodedAttention
    parts = [part for part in load(tmp_path / "out").modules() if isinstance(part, kind)]
    assert len(parts) == 2 and all(part.coded.rounds for part in parts)


@pytest.mark.parametrize(
    ("family", "before"),  # norms of keys, biases, no rope
    [("qwen3", "lorc"), ("qwen3", "mfa"), ("qwen2", "mfa-kr"), ("mpt", "lorc"), ("mpt", "mfa")],
)
def test_bases_alone_change_nothing(family, before, tmp_path):
    """With its codes turned off the model is what it was before the step."""
    source, steps = (
        save_model(tiny_model(family), tmp_path / "source"),
        [BEFORE[before], {"transform_coding": FAST_RUN}],
    )
    anymla.run(source, tmp_path / "before", steps=steps[:1])
    anymla.run(source, tmp_path / "out", steps=steps)
    with Exact():
        expected = logits(load(tmp_path / "before"), token_ids())
        plain = load(tmp_path / "out", codec="none")
        assert (logits(plain, token_ids()) - expected).abs().max() < 1e-8
        assert (logits(load(tmp_path / "out"), token_ids()) - expected).abs().max() > 1e-6  # there are codes


@pytest.mark.parametrize("before", ["lorc", "mfa"])
def test_every_way_of_generating_agrees(before, source, tmp_path):
    anymla.run(source, tmp_path / "out", steps=[BEFORE[before], {"kvquant": CODES["kvquant"][0]}])
    model, ids = load(tmp_path / "out"), token_ids(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **options)
    static = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, past_key_values=static, **options), greedy)
    beams = [model.generate(ids, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)
    travelled = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert torch.equal(travelled.generate(ids, **options), greedy)


@pytest.mark.slow
def test_a_tuned_gate_is_folded_and_then_coded(source, tmp_path):
    gate = {"mfa": {"kv_cache": 0.5, "key_reuse": True, "value_gate": True, **FAST_RUN}}
    tune = {"tune": TINY | {"tokens": 512, "eval_data": str(VALID)}}
    anymla.run(source, tmp_path / "out", steps=[gate, tune, {"transform_coding": CODES["transform_coding"][0]}])
    model = load(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert attention_class(attention.layer_spec) is CodedMfaAttention and attention.value_map is None
    assert logits(model, token_ids()).isfinite().all()

"""At full budget the converted model is the original, for every family, shape and rope scaling."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.methods.mla.rope import ROPE_CHOICES
from tests.families import FAST, ROPES, SHAPES, logits, make_model, save_model, token_ids

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = list(TOLERANCE)


def largest_difference(tmp_path, family, dtype, changes, length=40, **settings):
    model = make_model(family, dtype, **changes)
    source = save_model(model, tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", kv_cache=1.0, **FAST | settings)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert converted.dtype == dtype
    ids = token_ids(length=length)
    expected = logits(model, ids)
    assert expected.std() > 0.1  # a model whose logits say nothing would pass any test
    return (logits(converted, ids) - expected).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "changes"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_full_budget_is_the_original(tmp_path, family, dtype, changes):
    assert largest_difference(tmp_path, family, dtype, changes) < TOLERANCE[dtype]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_rope_scaling(tmp_path, family, rope):
    """Long enough (300 > max_position_embeddings 256 > original 64) that dynamic and longrope change frequencies."""
    changes = {"rope_parameters": ROPES[rope] | {"rope_theta": 10000.0}, "head_dim": 8}
    difference = largest_difference(tmp_path, family, torch.float64, changes, length=300)
    assert difference < TOLERANCE[torch.float64]


@pytest.mark.parametrize("factorization", ["output-aware", "joint-svd", "split-svd", "whitened", "balanced-pca"])
@pytest.mark.parametrize("rope", sorted(ROPE_CHOICES.keys() - {"freqfold-4", "freqfold-8", "freqfold-16"}))
def test_every_method_is_exact_at_full_budget(tmp_path, rope, factorization):
    difference = largest_difference(
        tmp_path, "llama", torch.float64, {"head_dim": 8}, rope=rope, factorization=factorization
    )
    assert difference < TOLERANCE[torch.float64]


def test_full_rank_without_rope_channels_keeps_position_free_part_exact(tmp_path):
    """All of y in the latent and every channel kept: r = 2Gd, the widest layout there is."""
    keys = 3 * 8
    difference = largest_difference(tmp_path, "llama", torch.float64, {"head_dim": 8}, rope_dims=keys, kv_rank=2 * keys)
    assert difference < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_stays_close(tmp_path, family, dtype, tolerance):
    """The error against float64 is at most three times what the dtype itself costs the original."""
    changes = {"head_dim": 8}
    exact = logits(make_model(family, torch.float64, **changes), token_ids())
    model = make_model(family, torch.float64, **changes).to(dtype)
    source = save_model(model, tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", kv_cache=1.0, **FAST)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert converted.dtype == dtype
    scale = exact.std()
    cost = (logits(model, token_ids()).double() - exact).abs().mean() / scale
    difference = (logits(converted, token_ids()).double() - exact).abs().mean() / scale
    assert difference < max(3 * cost, 1e-3)
    assert difference < tolerance

"""Corners that a real checkpoint can have."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import anymla
from anymla.account import Account, LayerAccount, measure
from anymla.data.text import bundled_text
from anymla.errors import CheckpointError
from anymla.evaluation.logits import Logits
from anymla.evaluation.scores import ScoreSums
from anymla.modeling import absorbed
from anymla.modeling.absorbed import absorbed_attention
from tests.families import FAST, logits, make_model, save_model, token_ids

CACHE = Account(layers=(LayerAccount(cache_bytes_per_token=4, cached_numbers=1, cache_bytes_at={}),))


def test_tokenizer_that_goes_by_model_type_stays_the_same(tmp_path):
    source = save_model(make_model("qwen3", torch.float32, head_dim=8), tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after) is type(before)
    assert after("Once upon 12 times").input_ids == before("Once upon 12 times").input_ids


def test_attention_that_gives_nothing(tmp_path):
    model = make_model("llama", torch.float64)
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data.zero_()
    source = save_model(model, tmp_path / "source")
    anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(converted, token_ids()) - logits(model, token_ids())).abs().max() < 1e-9


def test_float16_overflow_is_said(tmp_path):
    model = make_model("llama", torch.float32)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e4
    model.model.layers[0].mlp.up_proj.weight.data *= 1e4
    source = save_model(model.half(), tmp_path / "source")
    with pytest.raises(CheckpointError, match="overflow in float16 at layer 1"):
        anymla.convert(source, tmp_path / "out", kv_cache=0.5, dtype="float16", **FAST)
    assert not (tmp_path / "out").exists()


def test_scores_of_nan_are_refused():
    ids, sums = torch.zeros(1, 4, dtype=torch.long), ScoreSums()
    sums.add(Logits.of(torch.full((1, 4, 8), torch.nan)), ids, Logits.of(torch.zeros(1, 4, 8)))
    with pytest.raises(CheckpointError, match="NaN"):
        sums.scores(CACHE)


def test_hopeless_scores_are_finite():
    logits_of_wrong = torch.zeros(1, 4, 8)
    logits_of_wrong[..., 1] = 1e6
    sums = ScoreSums()
    sums.add(Logits.of(logits_of_wrong), torch.zeros(1, 4, dtype=torch.long), None)
    scores = sums.scores(CACHE)
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["perplexity"] > 1e300


def test_cache_of_a_window_smaller_than_the_probe():
    assert measure(make_model("mistral", torch.float32, sliding_window=6)).numbers_per_layer == 2 * 3 * 8


def test_few_cached_tokens_of_a_wide_latent(monkeypatch):
    monkeypatch.setattr(absorbed, "STREAM_SIZE", 0)
    tensors = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 2), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 2)
    assert absorbed_attention(*tensors, None, 0.1)[0].shape == (1, 4, 1, 16)


def test_paths_and_one_layer_and_short_context(tmp_path):
    model = make_model("llama", torch.float64, num_hidden_layers=1, max_position_embeddings=48)
    source = save_model(model, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(bundled_text("train").read_text()[:20000], newline="\r\n")
    report = anymla.convert(source, tmp_path / "out", kv_cache=1.0, calibration=text, calibration_tokens=2048)
    assert report.after.kl < 1e-9


def test_evaluation_uses_the_length_asked_for(tmp_path):
    source = save_model(make_model("llama", torch.float64), tmp_path / "source")
    scores = anymla.evaluate(source, bundled_text("valid"), tokens=512, length=256)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = []
    for document in bundled_text("valid").read_text().split("<|endoftext|>"):
        ids += [1, *AutoTokenizer.from_pretrained(source)(document.strip(), add_special_tokens=False).input_ids]
        if len(ids) >= 512:
            break
    assert ids[256] != 1
    windows = torch.tensor([ids[:256], [1, *ids[256:511]]])  # each begins with the BOS token
    log_p = logits(model, windows)[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])
    assert scores.perplexity == pytest.approx(log_p.mean().neg().exp().item())


def test_plan_takes_another_device(tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    plan = anymla.plan(source, kv_cache=0.5, **FAST)
    report = anymla.convert(source, tmp_path / "out", plan, device="cpu")
    assert report.plan.recipe.device == "cpu"

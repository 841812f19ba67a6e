"""The gauge of an exported cache: exact, and chosen so that a quantised cache loses less."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import anymla
from anymla.errors import RecipeError
from anymla.exports import gauge_choice
from anymla.exports.converted import read_converted
from anymla.exports.deepseek.writer import write_deepseek
from anymla.exports.gauge import Gauge
from anymla.exports.gauge_choice import latent_gauge
from anymla.exports.gguf import llama_cpp
from anymla.exports.vllm.writer import load_fused, write_vllm
from tests.export_check import FAST, converted, difference, load
from tests.families import make_model, save_model
from tests.family_models import tiny_model
from tests.tokenizers import give_tokenizer


def random_gauges(folder, grow=0):
    """One per layer, the latent ``grow`` numbers wider."""
    torch.manual_seed(0)
    made = []
    for layer in read_converted(folder).layers:
        rank, channels = layer.latent.kv_lora_rank, layer.latent.qk_rope_head_dim // 2
        encoder = torch.randn(rank + grow, rank, dtype=torch.float64) + 3 * torch.eye(rank + grow, rank)
        factors = torch.rand(channels, dtype=torch.float64) + 0.5
        made.append(Gauge(encoder, torch.linalg.pinv(encoder), factors))
    return made


def test_folds_exactly_into_deepseek(tmp_path):
    folder = converted(tmp_path, make_model("llama", torch.float32))
    (tmp_path / "out").mkdir()
    shape = write_deepseek(folder, tmp_path / "out", gauges=partial(random_gauges, grow=3))
    assert shape.sizes.rank == read_converted(folder).layers[0].latent.kv_lora_rank + 3
    assert difference(load(folder), load(tmp_path / "out")) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_folds_exactly_beside_biases_and_norms(tmp_path, family):
    model = tiny_model("qwen3") if family == "qwen3" else make_model("llama", torch.float32, attention_bias=True)
    source = save_model(model, tmp_path / "source")
    anymla.convert(source, folder := tmp_path / "converted", kv_cache=0.5, rope="freqfold-2", **FAST)
    write_vllm(folder, tmp_path / "out", pad="none", gauges=random_gauges)
    assert difference(load(folder), load_fused(tmp_path / "out")) < 1e-4


def blocks_of_4_bits(rows):
    """As llama.cpp's q4_0: a scale per block of 32."""
    blocks = rows.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 8
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(-2)


def test_the_chosen_gauge_makes_coarse_blocks_cost_less():
    """Few directions of the latents are large, gradients are in others, and one token is a hundred times larger."""
    torch.manual_seed(0)
    latent = torch.randn(512, 64, dtype=torch.float64) * torch.logspace(0, -2, 64)
    gradients = torch.randn(512, 64, dtype=torch.float64) * torch.logspace(-1, 0, 64)
    latent[0] *= 100
    encoder, decoder = latent_gauge(latent, gradients, 64)
    torch.testing.assert_close(decoder @ encoder, torch.eye(64, dtype=torch.float64))

    def cost(encoder, decoder):
        error = blocks_of_4_bits(latent @ encoder.T) @ decoder.T - latent
        return (error * gradients).sum(1).square().mean().item()

    own = torch.eye(64, dtype=torch.float64)
    spread = torch.linalg.qr(torch.randn_like(own)).Q
    assert cost(encoder, decoder) < 0.5 * min(cost(own, own), cost(spread, spread.T))


@pytest.mark.parametrize(("to", "cache"), [("gguf", "q8_0"), ("vllm", "fp8")])
def test_an_export_for_a_quantised_cache(tmp_path, monkeypatch, to, cache):
    """The same model, in whole blocks; commands, card and report name the cache; fp8's loss is measured in any case."""
    monkeypatch.setattr(llama_cpp, "llama_python", lambda: None)
    monkeypatch.setattr(gauge_choice, "TOKENS", 256)
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    if to == "gguf":
        give_tokenizer(source, "llama-bpe")
    anymla.convert(source, folder := tmp_path / "converted", kv_cache=0.5, target="gguf", **FAST)
    done = anymla.export(folder, tmp_path / "out", to, cache_type=cache)
    assert done.parity.tokens == done.parity.of and done.parity.difference < 1e-3
    found = json.loads((tmp_path / "out" / "export.json").read_text())
    assert found["cache_type"] == cache and f"--cache-type {cache}" in (tmp_path / "out" / "README.md").read_text()
    if to == "gguf":
        assert done.parity.cached_numbers == 64 and done.parity.cache_loss is None
        assert done.commands["llama.cpp"].endswith("--flash-attn on --cache-type-k q8_0 --cache-type-v q8_0")
    else:
        assert done.commands["vLLM (GPU)"].endswith("--kv-cache-dtype fp8")
        assert 0 < found["parity"]["cache_loss"]["kl"] < 0.1
    with pytest.raises(RecipeError, match=f"--cache-type q2 is not one of those of --to {to}: {cache}"):
        anymla.export(folder, tmp_path / "other", to, cache_type="q2")

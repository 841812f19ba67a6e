"""The gauge of an exported cache: exact, and chosen so that a quantised cache loses less."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import anymla
from anymla.exports.converted import read_converted
from anymla.exports.deepseek.writer import write_deepseek
from anymla.exports.gauge import Gauge
from anymla.exports.vllm.writer import load_fused, write_vllm
from tests.export_check import FAST, converted, difference, load
from tests.families import make_model, save_model
from tests.family_models import tiny_model


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

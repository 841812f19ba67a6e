"""Fixed scales in place of norms on queries and keys: another model, and said so."""

from __future__ import annotations

import json

import pytest
import torch

import anymla
from anymla.architectures.attention import read_attention
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.demo import bundled_model
from anymla.errors import RecipeError
from anymla.methods.mla.source import with_static_norms
from tests.damage import run_main
from tests.families import make_model, save_model


def test_static_norms_are_another_model_and_say_so(tmp_path, monkeypatch, capfd):
    source = save_model(make_model("qwen3", torch.float32, head_dim=16), tmp_path / "source")
    options = "--kv-cache 0.5 --target deepseek --static-qk-norm --calibration-tokens 512 --calibration-length 32"
    arguments = ["convert", str(source), "-o", str(tmp_path / "converted"), *options.split()]
    done = run_main([*arguments, "--reconstruction-steps", "2"], monkeypatch, capfd)
    assert done.code == 0
    assert "fixed scales replace norms" in done.err
    lost = [layer["norms_lost"] for layer in json.loads((tmp_path / "converted/conversion.json").read_text())["layers"]]
    assert all(0.001 < each < 0.5 for each in lost)
    assert anymla.export(tmp_path / "converted", tmp_path / "export").parity.difference < 1e-4
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"lose {sum(lost) / len(lost):.2%}" in card and f"{max(lost):.2%} in the worst layer" in card


def test_static_norms_lose_nothing_where_norms_do_nothing():
    """Inputs whose queries and keys all have one size per head: the fixed scales are the norms."""
    model = make_model("qwen3", head_dim=8, num_attention_heads=6)
    attention, config = model.model.layers[0].self_attn, model.config
    spec = read_model_spec(config.to_dict()).layers[0].attention
    source = read_attention(attention, spec, FAMILIES["qwen3"], config)
    inputs = torch.randn(1, 1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(2, 5, 1)
    inputs[1] *= -1
    static = with_static_norms(source, [inputs])
    assert not static.norms
    for found, expected in zip(static.project(inputs), source.project(inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_static_norms_are_for_layouts_without_norms():
    with pytest.raises(RecipeError, match="--static-qk-norm"):
        anymla.plan(bundled_model(), static_qk_norm=True)

"""anymla inspect --targets: which engines can have a model."""

from __future__ import annotations

import json

import torch

import anymla
from anymla.demo import bundled_model
from tests.damage import run_main
from tests.families import make_model, save_model
from tests.family_models import tiny_model


def test_inspect_targets(tmp_path, monkeypatch, capfd):
    done = run_main(["inspect", str(bundled_model()), "--targets", "--json"], monkeypatch, capfd)
    targets = json.loads(done.out)["targets"]
    assert [targets[name]["export"] for name in ("transformers", "deepseek", "vllm", "gguf")] == [
        "exact",
        "constrained",
        "exact",
        "constrained",
    ]
    assert "at most 4 rope channels" in targets["deepseek"]["why"]
    save_model(make_model("qwen3", torch.float32, head_dim=8), tmp_path)
    done = run_main(["inspect", str(tmp_path), "--targets"], monkeypatch, capfd)
    assert (done.code, done.out.count("lossy"), done.out.count("--static-qk-norm")) == (0, 2, 2)


def test_inspect_targets_of_latent_attention(stories, monkeypatch, capfd):
    for folder, words in ((stories.export, "kv_lora_rank"), (stories.converted, "written by anymla")):
        done = run_main(["inspect", str(folder), "--targets"], monkeypatch, capfd)
        assert done.code == 0
        assert "already multi-head latent attention" in done.out and words in done.out
        assert "serve it unchanged" in done.out and "anymla export" in done.out


def test_inspect_targets_of_experts(tmp_path):
    """They convert and export; vLLM on a CPU does not run them."""
    found = anymla.inspect(save_model(tiny_model("mixtral", torch.float32, sliding_window=None), tmp_path)).targets
    assert found["vllm"][0] == "exact" and "on GPUs only" in found["vllm"][1]
    assert "GPUs" not in anymla.inspect(bundled_model()).targets["vllm"][1]

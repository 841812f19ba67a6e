"""What anymla exports, in vLLM on a CPU: the same tokens and log probabilities as transformers, from latent attention.

vLLM runs in an environment of its own (install-vllm.sh), where nothing of anymla can be imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import anymla
from anymla.demo import bundled_model
from anymla.exports.step3 import write_step3
from anymla.exports.vllm import vllm_check
from anymla.exports.vllm.vllm_check import ask_vllm
from anymla.exports.vllm.writer import write_vllm
from tests.families import FAST, ROPES, make_model, save_model, token_ids

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENT = Path(os.environ.get("ANYMLA_ENGINES") or CACHE / "anymla-engines") / "vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED = any(ENVIRONMENT.glob("*.done"))
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not INSTALLED, reason=f"no vLLM in {ENVIRONMENT}: run tests/engines/install-vllm.sh"),
]
NEW = 32
PADDED = 512 + 64  # numbers per token and layer, whatever the model keeps: vLLM's CPU kernel knows no other size
# Largest difference of two log probabilities, by dtype, and with bfloat16 the mean one: it has 8 bits, and the two add
# up in other orders.
TOLERANCE = {"float32": 2e-4, "bfloat16": 1.0}
BFLOAT16_MEAN = 0.06


def run(model: Path, prompts: list[list[int]], *, dtype: str = "float32", trust: bool = True) -> tuple[Any, str]:
    """What run_vllm.py answers, and vLLM's log."""
    return ask_vllm(PYTHON, model, prompts, [NEW] * len(prompts), trust=trust, dtype=dtype)


@torch.no_grad()
def reference(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> tuple[list[Any], list[Any], list[Any]]:
    """Greedy tokens of each prompt in transformers, their log probabilities, and those of the prompt's own tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens, new, old = [], [], []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        logits = model(ids).logits[0, :-1].float().log_softmax(-1)
        chosen = logits.gather(1, ids[0, 1:, None])[:, 0]
        tokens.append(ids[0, len(prompt) :].tolist())
        old.append(chosen[: len(prompt) - 1])
        new.append(chosen[len(prompt) - 1 :])
    return tokens, new, old


def compare(converted: Path, export: Path, prompts: list[list[int]], *, trust: bool = True) -> tuple[Any, str]:
    """Holds vLLM's float32 tokens and log probabilities to those of the converted model; returns vLLM's account."""
    tokens, new, old = reference(converted, prompts, torch.float32)
    answer, log = run(export, prompts, trust=trust)
    assert not answer["anymla"]
    assert answer["tokens"] == tokens
    pairs = [*zip(new, answer["logprobs"], strict=True), *zip(old, answer["prompt_logprobs"], strict=True)]
    answer["difference"] = max((mine - torch.tensor(theirs)).abs().max().item() for mine, theirs in pairs)
    assert answer["difference"] < TOLERANCE["float32"]
    assert answer["attention"] == ["MLAAttention"] and answer["backend"] == ["CPU_MLA"]
    return answer, log


def story_prompts() -> list[list[int]]:
    """Three lengths in one batch; the longest fills many of the cache's pages of 16 tokens, and one in part."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    story = (bundled_model().parent / "tinystories-valid.txt").read_text()[:4000]
    ids = tokenizer("Once upon a time, there was a little girl"), tokenizer("The dog"), tokenizer(story)
    return [each.input_ids[:length] for each, length in zip(ids, (16, 5, 333), strict=True)]


@pytest.fixture(scope="module", params=[0.5, 0.3125], ids=["50%", "31%"])
def story(request, tmp_path_factory):
    """The bundled trained model, converted."""
    folder = tmp_path_factory.mktemp("story") / "converted"
    anymla.convert(bundled_model(), folder, kv_cache=request.param, calibration_tokens=16384, reconstruction_steps=0)
    return folder


def test_trained_model_is_fused(story, tmp_path):
    sizes = write_vllm(story, tmp_path / "export")
    answer, log = compare(story, tmp_path / "export", story_prompts())
    assert "FusedAttention) -> MLAAttention" in log
    assert sizes.rank + sizes.rope == PADDED
    assert answer["cache_bytes_per_token"] == 5 * 4 * PADDED and answer["layers"] == 5


@pytest.mark.parametrize("budget", [0.5, 0.3125], ids=["50%", "31%"])
def test_stock_deepseek(budget, tmp_path):
    """The DeepSeek export by vLLM's own DeepSeek-V3: no code of ours in the folder either."""
    converted, output = tmp_path / "converted", tmp_path / "export"
    options = {"calibration_tokens": 16384, "reconstruction_steps": 0}
    anymla.convert(bundled_model(), converted, kv_cache=budget, target="deepseek", **options)
    done = anymla.export(converted, output, "deepseek", pad="cpu")
    assert not list(output.glob("*.py"))
    answer, _ = compare(converted, output, story_prompts(), trust=False)
    assert answer["cache_bytes_per_token"] == 5 * 4 * PADDED == 5 * 4 * done.parity.cached_numbers


@pytest.mark.parametrize("target", ["vllm", "deepseek"])
def test_an_export_checks_itself_in_vllm(target, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_check, "vllm_python", lambda: PYTHON)
    options = {"calibration_tokens": 4096, "reconstruction_steps": 0}
    anymla.convert(bundled_model(), tmp_path / "converted", kv_cache=0.5, target="deepseek", **options)
    done = anymla.export(tmp_path / "converted", tmp_path / "export", target, pad="cpu")
    assert (done.parity.engine, done.parity.compared) == ("vLLM", "log probabilities of given tokens")
    assert 0 < done.parity.difference < 1e-4 and done.parity.tokens == done.parity.of == 96
    assert done.parity.cached_numbers == PADDED
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == done.to_dict()


FAMILIES = {
    "llama3": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **ROPES["llama3"]}, "head_dim": 16}),
    "llama-yarn-bias": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **ROPES["yarn"]}, "attention_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_fused(name, tmp_path):
    family, changes = FAMILIES[name]
    model = make_model(family, torch.float32, max_position_embeddings=512, **changes)
    source = save_model(model, tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", kv_cache=0.5, **FAST)
    write_vllm(tmp_path / "converted", tmp_path / "export")
    prompts = [token_ids(1, length)[0].tolist() for length in (3, 48, 200)]
    answer, log = compare(tmp_path / "converted", tmp_path / "export", prompts)
    assert "FusedAttention) -> MLAAttention" in log
    assert answer["cache_bytes_per_token"] == 2 * 4 * PADDED


def test_bfloat16(story, tmp_path):
    """Two roundings of one model: log probabilities of a text, not tokens, which part at the first near tie."""
    write_vllm(story, tmp_path / "export")
    prompts = story_prompts()
    _, _, expected = reference(story, prompts, torch.float32)
    answer, _ = run(tmp_path / "export", prompts, dtype="bfloat16")
    found = torch.cat([torch.tensor(each) for each in answer["prompt_logprobs"]])
    difference = (torch.cat(expected) - found).abs()
    assert difference.max() < TOLERANCE["bfloat16"] and difference.mean() < BFLOAT16_MEAN
    assert answer["cache_bytes_per_token"] == 5 * 2 * PADDED


def test_a_trained_mfa_in_the_layout_of_step3(tmp_path):
    """vLLM's own model of that family computes what transformers does; its CPU attention takes keys of 64 numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}
    stock = LlamaConfig(vocab_size=512, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(anymla.fresh_config(stock, cached_numbers=128, heads=8, query_rank=48))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(model, tmp_path / "trained")
    AutoTokenizer.from_pretrained(bundled_model()).save_pretrained(tmp_path / "trained")
    write_step3(tmp_path / "trained", tmp_path / "out")
    prompts = story_prompts()[:2]
    tokens, new, old = reference(tmp_path / "trained", prompts, torch.float32)
    answer, _ = ask_vllm(PYTHON, tmp_path / "out", prompts, [NEW] * 2, trust=False, backend="CPU_ATTN")
    assert answer["tokens"] == tokens and answer["backend"] == ["CPU_ATTN"]
    pairs = [*zip(new, answer["logprobs"], strict=True), *zip(old, answer["prompt_logprobs"], strict=True)]
    assert max((mine - torch.tensor(theirs)).abs().max().item() for mine, theirs in pairs) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "step",
    [{"saap": {"neurons": 0.75, "multiple": 16}}, {"mka": {"remove": 1, "protect_first": 1, "protect_last": 0}}],
    ids=["fewer neurons", "fewer layers"],
)
def test_a_narrower_or_shallower_model_is_a_stock_one(tmp_path, step):
    """``saap`` and ``mka`` write a Llama that vLLM's own model reads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=512, num_attention_heads=2, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(model, tmp_path / "source")
    AutoTokenizer.from_pretrained(bundled_model()).save_pretrained(tmp_path / "source")
    text = {"calibration_tokens": 2048, "calibration_length": 128}
    anymla.run(tmp_path / "source", tmp_path / "out", steps=[{name: own | text for name, own in step.items()}])
    prompts = story_prompts()[:2]
    tokens, new, old = reference(tmp_path / "out", prompts, torch.float32)
    answer, _ = ask_vllm(PYTHON, tmp_path / "out", prompts, [NEW] * 2, trust=False, backend="CPU_ATTN")
    assert answer["tokens"] == tokens
    pairs = [*zip(new, answer["logprobs"], strict=True), *zip(old, answer["prompt_logprobs"], strict=True)]
    assert max((mine - torch.tensor(theirs)).abs().max().item() for mine, theirs in pairs) < TOLERANCE["float32"]

"""The vLLM export in plain transformers: the converted model to the last bits, padded or not, cached or not."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import anymla
from anymla.architectures.families import FAMILIES as ALL
from anymla.architectures.families import TEXT_ONLY_INSIDE
from anymla.errors import CheckpointError, InfeasibleError, UnsupportedModelError
from anymla.exports.vllm.writer import load_fused, write_vllm
from anymla.io.auto import stock_class
from anymla.modeling.spec import layers_of
from tests.families import FAST, ROPES, converted_layers, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model

QUICK = FAST | {"reconstruction_steps": 0, "kv_cache": 0.5}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "head_dim": 14}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),  # a norm of queries and keys
} | {f"llama-{rope}": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}}) for rope in ROPES}
OTHERS = ["gpt2", "gpt_neox", "gptj", "olmo2", "dbrx", "cohere", "stablelm"]  # no rope, in part, in pairs; norms, clips


@pytest.fixture
def converted(tmp_path):
    """Converts a model to half of its cache, ranks and channels by layer."""

    def convert(model, **options):
        source = save_model(model, tmp_path / "source")
        anymla.convert(source, tmp_path / "converted", **QUICK | options)
        return tmp_path / "converted"

    return convert


def load(folder: Path, dtype: torch.dtype = torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()


def assert_same(converted: Path, export: Path, tolerance: float = 1e-12) -> None:
    """Logits of both, and of the export decoding with a cache."""
    model, ids = load(export), token_ids()
    expected = logits(load(converted), ids)
    assert (logits(model, ids) - expected).abs().max() < tolerance * expected.std()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        late = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)], dim=1)
    assert (late - expected[:, 20:]).abs().max() < tolerance * expected.std()
    held = {(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers}
    assert held == {(model.config.kv_lora_rank, model.config.qk_rope_head_dim)}


@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name, converted, tmp_path):
    family, changes = FAMILIES[name]
    folder = converted(make_model(family, **changes))
    sizes = write_vllm(folder, tmp_path / "export")
    assert (sizes.rank, sizes.rope) == (512, 64)
    assert_same(folder, tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name, converted, tmp_path):
    folder = converted(tiny_model(name))
    write_vllm(folder, tmp_path / "export")
    assert_same(folder, tmp_path / "export")


def test_one_scale(converted, tmp_path):
    """GPT-2's layers may have a scale of scores each; vLLM's prefill takes the first layer's for all."""
    write_vllm(converted(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)), tmp_path / "gpt2")
    assert {layer.attention.scaling for layer in converted_layers(load(tmp_path / "gpt2").config)} == {(8 + 64) ** -0.5}


def test_factor_of_logits(converted, tmp_path):
    """vLLM makes the logits itself, and knows a factor by one name only."""
    folder = converted(tiny_model("granite", torch.float32, logits_scaling=8.0))
    write_vllm(folder, tmp_path / "export")
    assert load_fused(tmp_path / "export").config.logit_scale == 1 / 8
    config = json.loads((tmp_path / "export" / "config.json").read_text()) | {"logit_scale": 1.0}
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="does more to its logits"):
        load_fused(tmp_path / "export")


@pytest.mark.parametrize("pad", ["none", "cuda", "full"])
def test_padding(pad, converted, tmp_path):
    folder = converted(make_model("qwen3", head_dim=16))
    layers = layers_of(json.loads((folder / "config.json").read_text()))
    rank, rope = (max(getattr(layer.latent, name) for layer in layers) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    sizes = write_vllm(folder, tmp_path / "export", pad=pad)
    wanted = {"none": (rank, rope, 16, 16), "cuda": (rank, 64, 64, 128), "full": (512, 64, 64, 128)}[pad]
    assert (sizes.rank, sizes.rope, sizes.nope, sizes.value) == wanted
    assert_same(folder, tmp_path / "export")


def test_folded_channels(converted, tmp_path):
    """Several pairs of a head in one channel (TransMLA's FreqFold), each with a weight of its own."""
    folder = converted(make_model("llama"), rope="freqfold-2", rope_dims=8)
    assert layers_of(json.loads((folder / "config.json").read_text()))[0].latent.channel_fold == 2
    write_vllm(folder, tmp_path / "export")
    assert_same(folder, tmp_path / "export")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype, converted, tmp_path):
    """No further from the numbers in double precision than the converted model in 16 bits is, or nearly."""
    kind = getattr(torch, dtype)
    folder = converted(make_model("qwen2", kind))
    write_vllm(folder, tmp_path / "export")
    exact = logits(load(folder), token_ids())
    model = load(tmp_path / "export", kind)
    rounding, error = (
        (logits(each, token_ids()).double() - exact).square().mean().sqrt() for each in (load(folder, kind), model)
    )
    assert error < 1.5 * rounding
    norm = model.model.layers[0].self_attn.mla.kv_a_layernorm
    latent = 4 * torch.randn(7, norm.weight.numel(), dtype=kind)
    assert (norm(latent) - latent).abs().max() <= (0 if dtype == "bfloat16" else 2**-14)


def test_code_travels_along(converted, tmp_path):
    """vLLM finds the base model under AutoModel, and the width of what it caches under head_dim."""
    write_vllm(converted(make_model("llama")), tmp_path / "export")
    config = AutoConfig.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert config.auto_map["AutoModel"] == "modeling_mla.MlaLlamaModel" and config.model_type == "mla_llama"
    assert config.head_dim == 576 and config.stock_head_dim == 8
    for name in ("modeling_mla", "model_classes", "fused_attention", "heads", "absorbed"):
        assert "import anymla" not in (text := (tmp_path / "export" / f"{name}.py").read_text())
        assert "from anymla" not in text


REFUSED = {
    "gemma2": "soft-cap",
    "bloom": "a bias on scores",
    "mistral": "a window of 24 tokens",
    "gpt_oss": "sinks",
    "falcon": "head_dim",
    "falcon_h1": "mix tokens beside attention",
    "biogpt": "lm_head",
    "jamba": "layers have latent attention",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, converted, tmp_path):
    """By the export, and by `inspect --targets` of the original."""
    model = make_model("mistral", sliding_window=24) if name == "mistral" else tiny_model(name)
    folder = converted(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        write_vllm(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert anymla.inspect(tmp_path / "source").targets["vllm"][0] == "impossible"


def test_families_that_the_backend_cannot_run():
    """The table against transformers' own classes."""
    heads = {
        name: "".join(inspect.getsource(base) for base in stock_class(name).__mro__ if "models" in base.__module__)
        for name in (ALL.keys() - TEXT_ONLY_INSIDE) & set(CONFIG_MAPPING.keys())
    }
    found = {name for name, source in heads.items() if "self.lm_head" not in source}
    found |= {name for name in heads if isinstance(getattr(CONFIG_MAPPING[name], "head_dim", None), property)}
    assert found == {name for name, family in ALL.items() if family.unserved is not None} == {"biogpt", "falcon"}


def test_too_wide_for_the_kernel(converted, tmp_path):
    folder = converted(make_model("llama", num_key_value_heads=6, head_dim=32), kv_cache=1.0)
    with pytest.raises(InfeasibleError, match="--pad cpu has room for a rope of 64"):
        write_vllm(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    write_vllm(folder, tmp_path / "export", pad="none")
    assert_same(folder, tmp_path / "export")


def test_a_plan_for_vllm_keeps_to_the_kernels_rope(converted, tmp_path):
    """Eight heads of 128 have 512 rope dims in half of their cache, unless the plan knows the target."""
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
    folder = converted(model, target="vllm")
    plan = anymla.MLAPlan.read(folder / "plan.yaml")
    assert plan.layers[0].rope_dims == 64 and plan.layers[0].kv_rank == 960
    with pytest.raises(InfeasibleError, match="a rank of 512 numbers, and it has 960: give --pad cuda or none"):
        write_vllm(folder, tmp_path / "export")
    assert write_vllm(folder, tmp_path / "export", pad="cuda").rope == 64


@pytest.mark.parametrize(
    ("target", "settings", "dims"),
    [("vllm", {}, 64), ("deepseek", {}, 64), ("gguf", {}, 128), ("vllm", {"rope": "high"}, 64)],
)
def test_rope_dims_of_a_target(target, settings, dims, tmp_path):
    """Sizes of Llama 3.1 8B; gguf has one channel for each of 64 frequencies."""
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
    source = save_model(model, tmp_path)
    plan = anymla.plan(source, kv_cache=0.5, target=target, reconstruction_steps=0, **settings)
    assert max(plan.layers[0].rope_choices) == dims
    assert [("--pad cuda" in note) for note in anymla.explain_plan(plan)["notes"]] == [True] * (target != "gguf")
    with pytest.raises(InfeasibleError, match=f"--rope-dims .* too large for --target {target}, which holds {dims}"):
        anymla.plan(source, kv_cache=1.0, target=target, rope_dims=130)


def test_rope_dims_that_no_target_holds(tmp_path):
    source = save_model(
        make_model("llama", num_attention_heads=48, num_key_value_heads=48, head_dim=2), tmp_path / "source"
    )
    with pytest.raises(InfeasibleError, match="--rope high turns 96 dims at least, --target vllm holds 64"):
        anymla.plan(source, kv_cache=0.9, target="vllm", rope="high")
    plan = anymla.plan(source, kv_cache=0.9, target="vllm")
    wide = {"rope_dims": 66, "kv_rank": plan.layers[0].cached_numbers - 66, "rope_choices": ()}
    plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update=wide) for layer in plan.layers)})
    with pytest.raises(InfeasibleError, match="rope dims 66 are more than the 64"):
        anymla.convert(source, tmp_path / "out", plan)


def test_not_converted(tmp_path):
    source = save_model(make_model("llama"), tmp_path / "source")
    with pytest.raises(CheckpointError, match="no converted model"):
        write_vllm(source, tmp_path / "export")

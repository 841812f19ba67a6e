"""Multi-matrix factorisation attention: the bridge from latent attention, the converter, training from scratch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import anymla
from anymla.account import measure
from anymla.architectures.attention import read_attention
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_config, read_model_spec, spec_of
from anymla.architectures.parts import attention_path
from anymla.demo import bundled_model
from anymla.errors import InfeasibleError, UnsupportedModelError
from anymla.exports.step3 import write_step3
from anymla.io.checkpoint import load_model
from anymla.methods.base import method_of
from anymla.methods.mfa.bridge import bridged
from anymla.methods.mfa.queries import low_rank_queries
from anymla.model_run.stream import decoder_layers
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.mfa_attention import MfaAttention, fold_value_gates
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.spec import LayerSpec
from tests.damage import VALID
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.family_models import tiny_config, tiny_model
from tests.method_contract import Case, Sample, account_is_what_is_measured, all_ways_of_reading_agree
from tests.test_methods import FAST_RUN, TINY

BRIDGED = {  # a family for each thing that attention does, and what its config needs for it
    "llama": {"attention_bias": True},
    "bloom": {},  # ALiBi, no rope, and the residual in the module
    "cohere": {},  # interleaved pairs, norms without a weight per head
    "dbrx": {},  # clipped queries, keys and values
    "gemma2": {},  # a soft-cap and a window
    "gpt_neox": {},  # rope turns a part of the head
    "gpt_oss": {},  # sinks
    "llama4_text": {},  # a temperature, complex rope
    "minimax_m2": {},  # norms over all heads
    "nanochat": {},  # norms after rope, rope backwards
    "phi3": {},  # scaled rope
    "qwen3": {},  # norms per head
}
BASE: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2},
}


def attention_call(model: Any, layer: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """An attention of ``model``, and what it is called with."""
    attention = (block := decoder_layers(model)[layer]).get_submodule(attention_path(block) or "")
    calls: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    logits(model, token_ids(2, 20))
    hook.remove()
    args, kwargs = calls[0]
    return attention, args, kwargs | {"past_key_values": None}


def random_latent(model_type: str, model: Any, fold: int = 1) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Latent attention with random weights that stands for the last attention of ``model``; what it is called with."""
    spec = read_model_spec(model.config.to_dict())
    index = max(spec.attention_layers)
    original, args, kwargs = attention_call(model, index)
    source = read_attention(original, spec.attention_layers[index], FAMILIES[model_type], model.config)
    rope = 6 if source.spec.rope_pairs else 0
    layer = LayerSpec(
        attention=source.spec, latent=LatentSpec(kv_lora_rank=7, qk_rope_head_dim=rope, channel_fold=fold), module="a"
    )
    latent = attention_class(layer)(original, model.config, layer).double().eval()
    random = torch.Generator().manual_seed(0)
    for name, tensor in latent.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) / 2 + ("norm" in name))
    if rope:
        index_of = torch.randint(source.spec.rope_pairs, latent.channel_index.shape, generator=random)
        latent.channel_index.copy_(index_of)
    return latent, args, {name: value for name, value in kwargs.items() if name != "past_key_values"}


@torch.no_grad()
@pytest.mark.parametrize("model_type", BRIDGED)
def test_the_bridge_is_exact(model_type):
    """MLA -> MFA-KR: the same output in float64, the same cache."""
    latent, args, kwargs = random_latent(model_type, tiny_model(model_type, **BRIDGED[model_type]))
    latent.config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    config = latent.config
    factorised = bridged(
        latent, MfaSpec(kv_lora_rank=7, qk_rope_head_dim=latent.qk_rope_head_dim), config, torch.float64
    )
    expected, found = (each(*args, **kwargs)[0] for each in (latent, factorised))
    assert expected.norm() > 0
    assert ((found - expected).norm() / expected.norm()).item() < 1e-10


@torch.no_grad()
def test_the_bridge_folds_channels():
    latent, args, kwargs = random_latent("llama", tiny_model("llama"), fold=2)
    factorised = bridged(latent, MfaSpec(kv_lora_rank=7, qk_rope_head_dim=6), latent.config, torch.float64)
    expected, found = (each(*args, **kwargs)[0] for each in (latent, factorised))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-10
    assert factorised.channel_index.tolist() == latent.channel_index[:3].tolist()


@torch.no_grad()
def test_queries_of_full_rank_are_exact():
    """S_q and Q of rank min(D, H d), and the least error under the input's moments below that."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(12, 16).double()
    query, states = torch.randn(40, 16).double(), torch.randn(200, 12).double() @ torch.randn(12, 12).double()
    expected = projection(states) @ query.T
    ones = torch.cat([states, torch.ones(200, 1)], 1)
    errors = {}
    for name, gram in (("moments", ones.T @ ones / 200), ("weights", None)):
        for rank in (5, 13, 16):
            down, bias, up = low_rank_queries(query, projection, rank, gram)
            assert (down.shape, bias.shape, up.shape) == ((rank, 12), (rank,), (40, rank))
            errors[name, rank] = ((states @ down.T + bias) @ up.T - expected).norm().item() / expected.norm().item()
        assert errors[name, 13] < 1e-8 and errors[name, 16] < 1e-8
    assert errors["moments", 5] < errors["weights", 5]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    folder = tmp_path_factory.mktemp("mfa")
    return save_model(make_model("llama", torch.float32), folder / "source")


@pytest.fixture(scope="module")
def latent(source, tmp_path_factory):
    """The same after the step mla."""
    folder = tmp_path_factory.mktemp("latent") / "mla"
    anymla.run(source, folder, steps=[{"mla": {"kv_cache": 0.5, **FAST}}])
    return folder


def test_key_reuse_after_mla(latent, tmp_path):
    """It reads the cache in every way alike, its bytes are those of mla, and it loads without its step."""
    case = Case("mfa", Sample({"key_reuse": True, "value_gate": True, **FAST_RUN}, {}), latent)
    before = load_model(latent)
    for promise in (all_ways_of_reading_agree, account_is_what_is_measured):
        (folder := tmp_path / promise.__name__).mkdir()
        promise(case, folder)
        after = load_model(folder / "out")
        assert measure(after).cache_bytes_at == measure(before).cache_bytes_at
        assert (logits(after, token_ids()) - logits(before, token_ids())).abs().max() < 1e-4


def test_tune_opens_the_gate_and_folds_it(source, latent, tmp_path):
    steps = [{"mfa": {"key_reuse": True, "value_gate": True, **FAST_RUN}}, {"tune": TINY | {"learning_rate": 1e-2}}]
    report = anymla.run(latent, tmp_path / "out", steps=steps, teacher=source)
    before, after = (report.steps[index].account for index in (0, 1))
    assert after.weight_bytes < before.weight_bytes and after.cache_bytes_per_token == before.cache_bytes_per_token
    model = load_model(tmp_path / "out")
    assert not any("value_" in name for name, _ in model.named_parameters())
    assert not any(layer.mfa.value_gate for layer in spec_of(read_config(tmp_path / "out")).layers)


def fresh(*, tie_word_embeddings: bool = False, **settings: Any) -> Any:
    """A fresh model, float64, away from where it starts."""
    torch.manual_seed(0)
    config = anymla.fresh_config(LlamaConfig(**BASE, tie_word_embeddings=tie_word_embeddings), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("reuse", [False, True], ids=["mfa", "mfa-kr"])
def test_decode_is_prefill_and_the_cache_is_as_small_as_said(reuse):
    """2 C numbers per token and layer of MFA, C of MFA-KR."""
    model, ids = fresh(cached_numbers=16, key_reuse=reuse), token_ids(2, 24)
    width, numbers = (16, 16) if reuse else (8, 16)
    assert numbers == (width if reuse else 2 * width)
    assert measure(model).cache_bytes_per_token == numbers * 8 * BASE["num_hidden_layers"]
    whole, cache, parts = logits(model, ids), None, []
    for start in range(0, 24, 4):
        for step in (ids[:, start : start + 3], ids[:, start + 3 : start + 4]):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9


@torch.no_grad()
def test_a_closed_gate_is_mfa_with_its_keys_as_values():
    """alpha = 0: the value is the key without rope, as in MFA with S_v = S_k."""
    reuse = fresh(cached_numbers=16, key_reuse=True)
    model = copy.deepcopy(reuse)
    for layer in model.model.layers:
        old = layer.self_attn
        old.value_gate.zero_()
        rank = old.kv_lora_rank
        mfa = replace(old.mfa, kv_lora_rank=2 * rank, value_rank=rank, value_gate=False)
        new = MfaAttention(old, model.config, replace(old.layer_spec, mfa=mfa)).double().eval()
        state = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("value_")}
        latent_rows = state["kv_a_proj_with_mqa.weight"][:rank]
        state["kv_a_proj_with_mqa.weight"] = torch.cat([latent_rows, state["kv_a_proj_with_mqa.weight"]])
        new.load_state_dict(state)
        layer.self_attn = new
    for layer in reuse.model.layers:
        layer.self_attn.value_gate.zero_()
    assert (logits(model, token_ids()) - logits(reuse, token_ids())).abs().max() < 1e-12


@torch.no_grad()
def test_a_folded_gate_changes_nothing(tmp_path):
    model = fresh(cached_numbers=16, key_reuse=True)
    before, weights = logits(model, token_ids()), measure(model).weight_bytes
    assert all(layer.self_attn.value_gate.abs().min() > 0 for layer in model.model.layers)
    fold_value_gates(model)
    assert (logits(model, token_ids()) - before).abs().max() < 1e-6 * before.abs().max()
    assert measure(model).weight_bytes < weights
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids()), logits(model, token_ids()))


def test_a_fresh_model_starts_as_its_family_does():
    """Projections have the family's deviation, norms are ones, gates are closed, channels lie in all frequencies."""
    torch.manual_seed(0)
    config = anymla.fresh_config(LlamaConfig(**BASE), cached_numbers=64, key_reuse=True, heads=8, query_rank=48)
    model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
        assert getattr(attention, name).weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert (attention.q_a_layernorm.weight == 1).all() and (attention.value_gate == 0).all()
    assert attention.channel_index.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert (attention.num_heads, attention.mfa.q_lora_rank, attention.scaling) == (8, 48, 64**-0.5)
    model(token_ids(), labels=token_ids()).loss.backward()
    assert attention.value_gate.grad.abs().max() > 0
    assert not attention.value_map.weight.grad.any()  # until the gate opens


def test_what_no_fresh_model_can_be_is_refused():
    with pytest.raises(InfeasibleError, match="multiple of 4"):
        anymla.fresh_config(LlamaConfig(**BASE), cached_numbers=18)
    with pytest.raises(InfeasibleError, match="rope_dims"):
        anymla.fresh_config(LlamaConfig(**BASE), cached_numbers=16, key_reuse=True, rope_dims=16)
    with pytest.raises(InfeasibleError, match="heads"):
        anymla.fresh_config(LlamaConfig(**BASE), cached_numbers=16, heads=6)
    with pytest.raises(UnsupportedModelError, match=r"qwen3.*qk_norm"):
        anymla.fresh_config(tiny_config("qwen3"), cached_numbers=16)


@pytest.mark.parametrize("settings", [{}, {"key_reuse": True}], ids=["mfa", "mfa-kr"])
def test_without_rope_full_rank_is_exact(settings, tmp_path):
    source = save_model(tiny_model("gpt2"), tmp_path / "source")
    anymla.run(source, tmp_path / "out", steps=[{"mfa": {"kv_cache": 1.0, **settings, **FAST_RUN}}])
    before, after = (logits(load_model(folder), token_ids()) for folder in (source, tmp_path / "out"))
    assert (after - before).abs().max() < 1e-6 * before.abs().max()


CALIBRATION = {"calibration_tokens": 2048, "calibration_length": 128}


@torch.no_grad()
def divergence(folder: Any, change: Any = None) -> float:
    """KL of a conversion of the bundled model from it, nats per token."""
    from transformers import AutoTokenizer

    text = VALID.read_text(encoding="utf-8")[:6000]
    ids = AutoTokenizer.from_pretrained(bundled_model())(text, return_tensors="pt").input_ids[:, :1024].view(-1, 128)
    original, model = load_model(bundled_model()), load_model(folder)
    if change is not None:
        change(model)
    before, after = (logits(each, ids).log_softmax(-1) for each in (original, model))
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_larger_cache_loses_less(tmp_path):
    found = []
    for share in (0.25, 0.5, 0.75):
        anymla.run(bundled_model(), tmp_path / f"{share}", steps=[{"mfa": {"kv_cache": share, **CALIBRATION}}])
        found.append(divergence(tmp_path / f"{share}"))
    assert found == sorted(found, reverse=True)


def test_key_reuse_by_joint_components_beats_keys_as_values(tmp_path):
    """Joint PCA with the value map that fits best, against S_v := S_k in the same attention with its own values."""

    def keys_as_values(model: Any) -> None:
        for layer in model.model.layers:
            attention = layer.self_attn
            values, keys = attention.mfa.value_rank, attention.kv_lora_rank - attention.mfa.value_rank
            rows = attention.kv_a_proj_with_mqa.weight.data
            rows[keys : keys + values] = 0
            shared = min(keys, values)
            rows[keys : keys + shared] = rows[:shared]

    steps = {
        "kr": {"kv_cache": 0.25, "key_reuse": True, "factorization": "balanced-pca"},
        "mfa": {"kv_cache": 0.5},
    }
    for name, settings in steps.items():
        anymla.run(bundled_model(), tmp_path / name, steps=[{"mfa": settings | CALIBRATION}])
    assert divergence(tmp_path / "kr") < divergence(tmp_path / "mfa", keys_as_values)


def refusal(model: Any, **settings: Any) -> str | None:
    """Why the step mfa refuses a model's config."""
    return method_of("mfa", settings).refuses(read_model_spec(model.to_dict()))


def test_what_it_cannot_have_is_refused_from_the_config(latent):
    llama = LlamaConfig(**BASE)
    assert "gate on the heads' output" in refusal(tiny_config("qwen3_next"))
    assert "norm before the output" in refusal(tiny_config("bitnet"))
    assert "after rope" in refusal(tiny_config("hunyuan_v1_dense"))
    assert "key_reuse" in refusal(llama, value_gate=True)
    assert "leave it out" in refusal(llama, query_rank=100)
    assert "norms or clips" in refusal(tiny_config("qwen3"), query_rank=8)
    assert "norms or clips" in refusal(tiny_config("olmo"), query_rank=8)
    converted = spec_of(read_config(latent))
    assert "key_reuse: true" in method_of("mfa", {}).refuses(converted)
    assert "leave kv_cache out" in method_of("mfa", {"key_reuse": True, "kv_cache": 0.5}).refuses(converted)
    windowed = tuple(replace(layer, latent=replace(layer.latent, exact_window=8)) for layer in converted.layers)
    assert "exact_window" in method_of("mfa", {"key_reuse": True}).refuses(replace(converted, layers=windowed))


@pytest.mark.parametrize(
    ("later", "given", "said"),
    [
        ("mla", {}, "not stock any more"),
        ("mfa", {}, "converted already"),
        ("transform_coding", {"key_reuse": True, "value_gate": True}, "value gates are still to be trained"),
    ],
)
def test_what_cannot_follow_it_says_so(later, given, said):
    after = method_of("mfa", {"kv_cache": 0.5, **given}).plan(read_model_spec(LlamaConfig(**BASE).to_dict())).after
    assert said in method_of(later, {}).refuses(after)


@torch.no_grad()
def step3(folder: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits as vLLM's Step3TextForCausalLM computes them (model_executor/models/step3_text.py), of dense layers."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    width, shared, heads = config["head_dim"], config["share_q_dim"], config["num_attention_heads"]
    frequency = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.arange(ids.shape[1]).double()[:, None] * frequency

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(
            states, states.shape[-1:], weights[f"{name}.weight"], config["rms_norm_eps"]
        )

    def rotate(states: torch.Tensor) -> torch.Tensor:
        real, imag = states.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([real * cos - imag * sin, imag * cos + real * sin], -1)

    hidden = weights["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}."
        assert str(index) not in config["moe_layers_enum"].split(",")
        qkv = norm(hidden, f"{name}input_layernorm") @ weights[f"{name}self_attn.qkv_proj.weight"].T
        query, key, value = qkv.split([shared, width, width], -1)
        query = norm(query, f"{name}self_attn.inter_norm") @ weights[f"{name}self_attn.wq.weight"].T
        query, key = rotate(query.unflatten(-1, (heads, width)).transpose(1, 2)), rotate(key[:, None])
        scores = (query @ key.mT * width**-0.5).masked_fill(~torch.ones(2 * [ids.shape[1]]).tril().bool(), -1e30)
        context = (scores.softmax(-1) @ value[:, None]).transpose(1, 2).flatten(2)
        hidden = hidden + context @ weights[f"{name}self_attn.o_proj.weight"].T
        states = norm(hidden, f"{name}post_attention_layernorm")
        gate, up, down = (weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        hidden = hidden + (torch.nn.functional.silu(states @ gate) * (states @ up)) @ down
    return norm(hidden, "model.norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_the_step3_export_is_what_vllm_computes(tied, tmp_path):
    model = fresh(cached_numbers=16, heads=8, query_rank=12, tie_word_embeddings=tied)
    save_model(model, tmp_path / "trained")
    write_step3(tmp_path / "trained", tmp_path / "out")
    expected = logits(model, token_ids())
    assert (step3(tmp_path / "out", token_ids()) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_step3_cannot_hold_is_refused(latent, tmp_path):
    save_model(fresh(cached_numbers=16, key_reuse=True), tmp_path / "reuse")
    with pytest.raises(UnsupportedModelError, match=r"before the step mfa, with anymla export"):
        write_step3(tmp_path / "reuse", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="one MFA in all layers"):
        write_step3(latent, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"factorised \(mfa\).*before the step mfa"):
        anymla.export(tmp_path / "reuse", tmp_path / "out", "vllm", dtype="float32")
    assert not (tmp_path / "out").exists()

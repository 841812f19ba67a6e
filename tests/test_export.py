"""Exports: stock DeepSeek checkpoints that compute what the converted model does."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

import anymla
from anymla.exports import parity, weight_files
from anymla.exports.deepseek.writer import write_deepseek
from anymla.exports.fold import channel_slots
from anymla.methods.mla.survey import SplitSurvey
from tests.export_check import FAST, TARGET, converted, difference, load
from tests.families import ROPES, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model

# shapes of Llama, and families whose layers fold into DeepSeek's: (id, family, changes)
LLAMAS = [
    ("mha", {"num_key_value_heads": 6}),
    ("gqa", {}),
    ("mqa", {"num_key_value_heads": 1}),
    ("tied", {"tie_word_embeddings": True}),
    ("head-dim-14", {"head_dim": 14}),
    ("head-dim-16", {"head_dim": 16}),
    ("eps-of-deepseek", {"rms_norm_eps": 1e-6}),
    ("eps-that-matters", {"rms_norm_eps": 1e-2}),
    ("theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama3", {"head_dim": 16, "rope_parameters": ROPES["llama3"] | {"rope_theta": 100.0}}),
]
OTHERS = [
    ("mistral", {"sliding_window": None}),
    (
        "granite",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    ),
    ("granite", {"tie_word_embeddings": True, "logits_scaling": 3.0}),
    ("phi3", {"rope_parameters": ROPES["default"] | {"rope_theta": 10000.0}}),
    ("ernie4_5", {"use_bias": False}),
    ("helium", {}),
    ("glm", {"attention_bias": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": False}),
    ("smollm3", {"no_rope_layers": [1, 1], "use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    ("ministral", {"sliding_window": 256, "layer_types": ["full_attention"] * 2}),
]


@torch.no_grad()
def cached_logits(model, ids):
    """All but four tokens at once, the rest one by one."""
    output = model(input_ids=ids[:, :-4], use_cache=True)
    found = [output.logits]
    for index in range(ids.shape[1] - 4, ids.shape[1]):
        output = model(input_ids=ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-5)])
@pytest.mark.parametrize("changes", [case[1] for case in LLAMAS], ids=[case[0] for case in LLAMAS])
def test_llama_as_deepseek(tmp_path, changes, dtype, tolerance):
    """In float64 what is left is the norms and rope tables that transformers computes in float32."""
    source = converted(tmp_path, make_model("llama", getattr(torch, dtype), **changes))
    (tmp_path / "export").mkdir()
    write_deepseek(source, tmp_path / "export")  # anymla.export writes no float64
    before, after = load(source, dtype=dtype), load(tmp_path / "export", dtype=dtype)
    assert type(after) is DeepseekV3ForCausalLM
    assert difference(before, after) < tolerance
    ids = token_ids()
    assert (cached_logits(after, ids) - logits(after, ids)).abs().max() < tolerance * logits(after, ids).std()
    planned = {layer.cached_numbers for layer in anymla.MLAPlan.read(source / "plan.yaml").layers}
    found = parity.check_parity(source, tmp_path / "export")
    assert {found.cached_numbers} == planned
    assert found.tokens == found.of == 96


@pytest.mark.parametrize(("family", "changes"), OTHERS)
def test_other_families_as_deepseek(tmp_path, family, changes):
    source = converted(tmp_path, tiny_model(family, torch.float32, **changes))
    anymla.export(source, tmp_path / "export")
    assert difference(load(source), load(tmp_path / "export")) < 1e-4


@pytest.mark.parametrize(
    ("pad", "sizes"), [("cpu", (512, 64, 8, 8)), ("cuda", (None, 64, 64, 128)), ("full", (512, 64, 64, 128))]
)
def test_padding_is_exact(stories, tmp_path, pad, sizes):
    anymla.export(stories.converted, tmp_path / "export", pad=pad)
    after = load(tmp_path / "export")
    config = after.config
    found = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert found == (sizes[0] or load(stories.converted).config.kv_lora_rank, *sizes[1:])
    assert difference(load(stories.converted), after, length=200) < 1e-4


def test_stories_give_the_same_tokens(stories):
    """The bar: 3 x 32 greedy tokens, and the cache that was planned."""
    assert (stories.done.parity.tokens, stories.done.parity.of) == (96, 96)
    assert stories.done.parity.difference < 1e-4
    assert stories.done.parity.cached_numbers == 64 * stories.share
    sizes = {file.name: file.stat().st_size for file in stories.export.iterdir()}
    assert stories.done.bytes == sum(sizes.values()) - sizes["README.md"] - sizes["export.json"]
    assert difference(load(stories.converted), load(stories.export), length=400) < 1e-4


def test_loads_where_there_is_no_anymla(stories, without_anymla):
    """An interpreter in which importing anymla fails; stock transformers, no remote code."""
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
ids = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt").input_ids
answer = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0].tolist()
"""
    told = without_anymla.run(code, folder=str(stories.export))
    ids = AutoTokenizer.from_pretrained(stories.converted)("Once upon a time", return_tensors="pt").input_ids
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    assert told == load(stories.converted).generate(ids, **options)[0].tolist()


def test_a_plan_for_deepseek_costs_little(stories):
    """Against a free plan with the same settings: KL at 50 % 0.07 and 0.08, at 31.25 % 0.29 and 0.32 (40 steps)."""
    assert stories.report.after.kl < (0.2 if stories.share == 0.5 else 0.6)
    layers = stories.report.plan.layers
    assert all(layer == layers[0] for layer in layers)
    assert layers[0].rope_step is not None


def test_bfloat16(stories, tmp_path):
    done = anymla.export(stories.converted, tmp_path / "export", dtype="bfloat16")
    assert load(tmp_path / "export").dtype == torch.bfloat16
    assert done.parity.difference < done.parity.tolerance == 0.1


def test_float32_export_of_bfloat16_weights_rounds_nothing(tmp_path):
    source = converted(tmp_path, make_model("llama", torch.bfloat16))
    assert anymla.export(source, tmp_path / "export", dtype="float32").parity.difference < 1e-4
    assert anymla.export(source, tmp_path / "same").parity.tolerance == 0.1


def test_latent_norm_is_neutral_for_any_token(stories):
    """For inputs of the largest size a norm can give, the latent behind kv_a_layernorm is linear in them."""
    attention = load(stories.export, dtype="float64").model.layers[0].self_attn
    norm = load(stories.export).model.layers[0].input_layernorm.weight.double()
    x = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = norm * x / x.square().mean(-1, keepdim=True).sqrt()
    rank = attention.kv_lora_rank
    latent = attention.kv_a_proj_with_mqa(x)[:, :rank]
    linear = latent * attention.kv_a_layernorm.weight.double() / math.sqrt(1e-6)
    assert linear.abs().max() > 0.1
    torch.testing.assert_close(attention.kv_a_layernorm(latent).double(), linear, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("channels", "rope"), [(4, 8), (3, 64), (4, 64), (32, 64), (20, 64), (1, 2)])
def test_padded_places_hold_all_channels(channels, rope):
    slots = channel_slots(channels, rope)
    assert len(slots.unique()) == channels
    assert slots[-1] < rope // 2


def test_strided_channels(tmp_path):
    """Every third frequency of sixteen, told by the plan; the export's base has them in a row."""
    plan = anymla.plan(
        save_model(make_model("llama", torch.float32, head_dim=32), tmp_path / "source"), **FAST | TARGET
    )
    given = {"rope_dims": 12, "kv_rank": plan.layers[0].cached_numbers - 12, "rope_choices": (), "rope_step": 3}
    plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update=given) for layer in plan.layers)})
    anymla.convert(tmp_path / "source", tmp_path / "converted", plan)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert stored["model.layers.1.self_attn.channel_index"].tolist() == [0, 3, 6, 9, 12, 15]
    for pad in ("none", "cpu"):
        anymla.export(tmp_path / "converted", tmp_path / pad, pad=pad)
        assert difference(load(tmp_path / "converted"), load(tmp_path / pad), length=200) < 1e-4


def test_goes_on_with_the_split_that_was_chosen(tmp_path, monkeypatch):
    """A conversion stopped after its first layer looks at no split again, and ends in the same weights."""

    def stop(done, *_):
        if done == 1:
            raise KeyboardInterrupt

    source = save_model(make_model("llama", torch.float32, head_dim=16), tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        anymla.convert(source, tmp_path / "out", **FAST | TARGET, progress=stop)
    kept = json.loads((tmp_path / ".out.partial/.work/progress.json").read_text())
    assert [fact is not None for fact in kept["survey"]] == [True, True]
    with monkeypatch.context() as patch:
        patch.setattr(SplitSurvey, "layer", lambda *_: pytest.fail("looked again"))
        anymla.convert(source, tmp_path / "out", **FAST | TARGET)
    anymla.convert(source, tmp_path / "whole", **FAST | TARGET)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files.write_weights, "__kwdefaults__", {"size": 200_000})
    anymla.export(stories.converted, tmp_path / "export")
    assert len(list(tmp_path.glob("export/model-*-of-*.safetensors"))) > 2
    assert difference(load(stories.export), load(tmp_path / "export")) == 0

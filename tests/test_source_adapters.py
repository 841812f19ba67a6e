"""Adapters as sources: merged as peft merges them, wherever they lie, or refused by name."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import anymla
from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from tests.families import FAST, logits, make_model, save_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's doing
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 16},
    "rank-stabilised": {"target_modules": LINEAR, "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 5},
        "alpha_pattern": {"v_proj": 3, "self_attn.k_proj": 7},
    },
    "lengths": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "saved-modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


def train(model, folder, **settings):
    """An adapter whose numbers are all far from nought, saved as peft saves it."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter) * (1 + (parameter.dim() == 1))
    adapted.save_pretrained(folder)
    return folder


def pair(tmp_path, case="attention", family="llama", **changes):
    """A base, and an adapter that names it."""
    base = save_model(make_model(family, torch.float32, **changes), tmp_path / "base")
    return base, train(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **CASES[case])


def merged(base, adapter):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()


def assert_merged(source, expected):
    with plain_source(source) as plain:
        assert plain.notes
        got = AutoModelForCausalLM.from_pretrained(plain.folder)
    assert not plain.folder.exists()
    state = expected.state_dict()
    assert got.state_dict().keys() == state.keys()
    for name, tensor in got.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=1e-6, rtol=1e-6), name
    assert torch.allclose(logits(got, token_ids()), logits(expected, token_ids()), atol=1e-4)


@pytest.mark.parametrize("case", list(CASES))
def test_merged_as_peft_merges(tmp_path, case):
    base, adapter = pair(tmp_path, case, attention_bias=case == "biases")
    assert_merged(locate(adapter), merged(base, adapter))


def test_a_weight_that_lies_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    shape = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "vocab_size": 512}
    base = save_model(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = train(model, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert_merged(locate(adapter), merged(base, adapter))


def test_a_tied_head_of_its_own(tmp_path):
    base = save_model(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = merged(base, adapter)
    with plain_source(locate(adapter)) as plain:
        assert json.loads((plain.folder / "config.json").read_text())["tie_word_embeddings"] is False
        got = AutoModelForCausalLM.from_pretrained(plain.folder)
    assert torch.allclose(logits(got, token_ids()), logits(expected, token_ids()), atol=1e-4)
    assert not torch.equal(got.lm_head.weight, got.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_are_rounded_once(tmp_path, dtype):
    base = save_model(make_model("qwen3", dtype), tmp_path / "base")
    adapter = train(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **CASES["all-linear"])
    fine = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = fine.merge_and_unload().state_dict()
    with plain_source(locate(adapter)) as plain:
        got = AutoModelForCausalLM.from_pretrained(plain.folder).state_dict()
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.float(), expected[name].to(dtype).float(), atol=1e-6, rtol=2**-7), name


def rename_base(adapter, name):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("name", ["../base", "base"])
def test_the_base_is_found_from_the_adapter_or_from_here(tmp_path, monkeypatch, name):
    base, adapter = pair(tmp_path)
    rename_base(adapter, name)
    here = tmp_path if name == "base" else tmp_path / "far" / "away"  # ../base is not there
    here.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    assert_merged(locate(adapter), merged(base, adapter))


def test_a_base_that_is_not_here_is_named(tmp_path):
    _, adapter = pair(tmp_path)
    rename_base(adapter, "nobody/nothing")
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' is not here.*--adapter"):
        locate(adapter)
    rename_base(adapter, None)
    with pytest.raises(CheckpointError, match=r"does not name its base model.*--adapter"):
        locate(adapter)


def test_an_adapter_beside_its_base(tmp_path):
    base, adapter = pair(tmp_path)
    expected = merged(base, adapter)
    original = AutoModelForCausalLM.from_pretrained(base)
    for file in adapter.iterdir():
        if file.name != "README.md":
            shutil.copyfile(file, base / file.name)
    assert_merged(locate(base), expected)
    assert_merged(locate(base, adapter=adapter), expected)
    assert_merged(locate(base, adapter="none"), original)


@pytest.mark.parametrize("place", ["alone", "beside", "none", "given"])
def test_convert_merges_it_and_says_so(tmp_path, place):
    base, adapter = pair(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(base) if place == "none" else merged(base, adapter)
    source, settings = base, {}
    if place == "alone":
        source = adapter
    elif place == "given":
        settings = {"adapter": adapter}
    else:
        for file in adapter.glob("adapter_*"):
            shutil.copyfile(file, base / file.name)
        settings = {"adapter": "none"} if place == "none" else {}
    report = anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST, **settings)
    assert ("left out" if place == "none" else "merged") in report.notes[0]
    assert report.notes[0] in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"] == list(report.notes)
    assert report.plan.model == str(source)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(got, token_ids()), logits(expected, token_ids()), atol=2e-3)


def test_eval_puts_it_on_the_original(tmp_path):
    base, adapter = pair(tmp_path)
    anymla.convert(base, tmp_path / "out", kv_cache=1.0, adapter=adapter, **FAST)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 40)
    notes = []
    same = anymla.evaluate(
        tmp_path / "out", text, against=base, adapter=adapter, tokens=256, length=64, note=notes.append
    )
    other = anymla.evaluate(tmp_path / "out", text, against=base, tokens=256, length=64)
    assert same.kl < 1e-5 < 1e-3 < other.kl
    assert len(notes) == 1 and "merged" in notes[0]
    alone = anymla.evaluate(base, text, adapter=adapter, tokens=256, length=64)
    assert alone.perplexity == pytest.approx(same.perplexity, rel=1e-3)


def changed_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'.*merge_and_unload"),
        ({"peft_type": "LOHA"}, "type 'LOHA'"),
        ({"peft_type": None}, "type None"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "'target_parameters'.*merge_and_unload"),
        ({"trainable_token_indices": [1, 2]}, "'trainable_token_indices'"),
        ({"something_new": True}, "'something_new'"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*changes the base"),
        ({"init_lora_weights": "olora"}, "'olora'"),
    ],
)
def test_what_is_more_than_lora_is_refused_before_weights_are_read(tmp_path, changes, says):
    _, adapter = pair(tmp_path)
    changed_config(adapter, **changes)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=says), plain_source(locate(adapter)):
        pass
    assert anymla.inspect(adapter).reason


def test_a_module_that_the_base_lacks_is_named(tmp_path):
    _, adapter = pair(tmp_path)
    for case, changes in (("fewer layers", {"num_hidden_layers": 1}), ("another shape", {"hidden_size": 24})):
        other = save_model(make_model("llama", torch.float32, **changes), tmp_path / case)
        says = r"layers\.1\.self_attn\.[qv]_proj'" if case == "fewer layers" else "q_proj.* make .* and it has"
        with pytest.raises(CheckpointError, match=says), plain_source(locate(other, adapter=adapter)):
            pass
    with pytest.raises(CheckpointError, match=r"targets .*(q|v)_proj"):
        shape = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "vocab_size": 512}
        other = save_model(GPT2LMHeadModel(GPT2Config(**shape)), tmp_path / "gpt2")
        with plain_source(locate(other, adapter=adapter)):
            pass


def test_files_that_cannot_be_read_are_named(tmp_path):
    base, adapter = pair(tmp_path)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"), plain_source(locate(adapter)):
        pass
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="can run code"), plain_source(locate(adapter)):
        pass
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        locate(base, adapter=base)
    with pytest.raises(CheckpointError, match="is itself an adapter"):
        locate(adapter, adapter=adapter)


def test_the_originals_adapter_on_a_conversion(tmp_path):
    base, adapter = pair(tmp_path)
    anymla.convert(base, tmp_path / "out", kv_cache=0.5, **FAST)
    with (
        pytest.raises(CheckpointError, match=r"targets .*v_proj"),
        plain_source(locate(tmp_path / "out", adapter=adapter)),
    ):
        pass
    other = train(AutoModelForCausalLM.from_pretrained(base), tmp_path / "mlp", target_modules=["up_proj", "lm_head"])
    with plain_source(locate(tmp_path / "out", adapter=other)) as plain:
        assert "outside attention" in plain.notes[1]
        got = AutoModelForCausalLM.from_pretrained(plain.folder).state_dict()
    whole, before = (
        merged(base, other).state_dict(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(),
    )
    for name, tensor in got.items():
        expected = whole[name] if "up_proj" in name or "lm_head" in name else before[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name

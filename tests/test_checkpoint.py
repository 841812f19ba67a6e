"""A converted folder loads everywhere, round trips exactly, and describes itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import anymla
from anymla.demo import bundled_model
from anymla.modeling.attention_spec import CONFIG_FIELDS
from anymla.modeling.modeling_anymla import AnymlaLlamaForCausalLM
from anymla.modeling.spec import KEY, OLD_KEY
from tests.families import FAST, SHAPES, converted_layers, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model


@pytest.mark.parametrize(("family", "changes"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_save_and_load_round_trip_exactly(tmp_path, family, changes):
    source = save_model(make_model(family, torch.float32, **changes), tmp_path / "source")
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(model)
    assert torch.equal(logits(model, token_ids()), logits(again, token_ids()))
    first, second = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ("lm_head.weight" in first) != bool(changes.get("tie_word_embeddings"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_loads_without_anymla(tmp_path, family, without_anymla):
    source = save_model(make_model(family, torch.float32, head_dim=8), tmp_path / "source")
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits(model, token_ids())
    found = without_anymla.logits(tmp_path / "out", {"input_ids": token_ids()}, resaved=tmp_path / "resaved")
    assert torch.equal(found, expected)
    without_anymla.run(
        "import transformers; transformers.AutoTokenizer.from_pretrained(folder)", folder=str(tmp_path / "out")
    )
    resaved = AutoModelForCausalLM.from_pretrained(tmp_path / "resaved").eval()
    assert torch.equal(logits(resaved, token_ids()), expected)
    assert (tmp_path / "resaved" / "modeling_anymla.py").is_file()


OLD = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "window": ("llama", {"exact_window": 5}),
    "deepseek": ("llama", {"target": "deepseek"}),
}


def as_written_by_0_1(folder):
    """Rewrites config.json of a converted folder: one flat list of the converted layers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[OLD_KEY] = []
    for layer in config.pop(KEY)["layers"]:
        known = {name: value for name, value in layer["attention"].items() if name not in CONFIG_FIELDS[4:]}
        biases = layer["latent"].pop("biases", True)
        config[OLD_KEY].append(
            {"module": layer["module"], "query_bias": biases, "bias": biases} | known | layer["latent"]
        )
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("model_type", "settings"), OLD.values(), ids=OLD)
def test_a_folder_of_0_1_loads_unchanged(tmp_path, model_type, settings, without_anymla):
    source = save_model(tiny_model(model_type, torch.float32), tmp_path / "source")
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **settings, **FAST)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), token_ids())
    as_written_by_0_1(tmp_path / "out")
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(old, token_ids()), expected)
    assert torch.equal(without_anymla.logits(tmp_path / "out", {"input_ids": token_ids()}), expected)


def test_sharded_files(tmp_path):
    model = make_model("qwen2", torch.float32, num_hidden_layers=4)
    source = save_model(model, tmp_path / "source", max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    anymla.convert(source, tmp_path / "out", kv_cache=1.0, max_shard_size="100KB", **FAST)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(converted, token_ids()) - logits(model, token_ids())).abs().max() < 1e-4
    converted.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(converted, token_ids()), logits(again, token_ids()))


def test_folder_holds_what_a_user_expects(converted_folder):
    names = {path.name for path in converted_folder.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_anymla.py", "recipe.yaml", "plan.yaml"} <= names
    assert {"conversion.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    card = (converted_folder / "README.md").read_text()
    assert "25.00% of the KV cache" in card
    assert "| 320 |" in card  # measured bytes per token of the converted model
    source = Path(anymla.__file__).parent / "modeling" / "modeling_anymla.py"
    assert (converted_folder / "modeling_anymla.py").read_bytes() == source.read_bytes()


def test_config_has_deepseeks_names(converted_folder):
    config = AutoConfig.from_pretrained(converted_folder)
    assert config.model_type == "anymla_llama"
    assert config.architectures == ["AnymlaLlamaForCausalLM"]
    assert config.qk_nope_head_dim == config.v_head_dim == 8
    assert config.kv_lora_rank == max(layer.latent.kv_lora_rank for layer in converted_layers(config))
    assert config.qk_rope_head_dim == max(layer.latent.qk_rope_head_dim for layer in converted_layers(config))
    latents = [layer.latent for layer in converted_layers(config)]
    assert all(latent.kv_lora_rank + latent.qk_rope_head_dim == 16 for latent in latents)
    assert not hasattr(config, "quantization_config")


def test_loads_after_import_in_either_order(converted_folder):
    for imports in ("import anymla, transformers", "import transformers, anymla"):
        code = (
            f"{imports}\n"
            "from transformers import AutoConfig, AutoModelForCausalLM\n"
            f"AutoConfig.from_pretrained({str(converted_folder)!r})\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(converted_folder)!r})\n"
            "assert type(model).__module__ == 'anymla.modeling.modeling_anymla', type(model)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_import_is_free_of_torch():
    code = "import sys, anymla; anymla.inspect; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_source_is_not_touched(tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_class_and_tokenizer(converted, converted_folder):
    assert isinstance(converted, AnymlaLlamaForCausalLM)
    text = "Once upon a time"
    assert (
        AutoTokenizer.from_pretrained(converted_folder)(text).input_ids
        == AutoTokenizer.from_pretrained(bundled_model())(text).input_ids
    )


def test_trains(converted_folder):
    """Gradients reach every floating weight of the converted attention."""
    model = AutoModelForCausalLM.from_pretrained(converted_folder).train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[1].self_attn.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

"""Arguments that releases of transformers rename or add: known names all work, an unknown one is never dropped."""

from __future__ import annotations

import inspect
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import anymla
from anymla.errors import CheckpointError
from anymla.modeling import model_classes
from anymla.modeling.arguments import cache_argument, cache_of, take_cache
from anymla.refresh import refresh
from tests.damage import run_main
from tests.families import FAST, make_model, save_model, token_ids


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    """A converted tiny model, float64."""
    path = tmp_path_factory.mktemp(request.param)
    source = save_model(make_model(request.param, torch.float64), path / "source")
    anymla.convert(source, path / "out", kv_cache=0.5, **FAST)
    return path / "out"


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def decoded(model, **names):
    """Logits token by token, the cache given to the model's layers by whatever name."""
    cache, ids = DynamicCache(config=model.config), token_ids()
    steps = [
        model(input_ids=part, **{names.get("name", cache_argument(model)): cache}).logits for part in ids.split(8, 1)
    ]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def whole(model):
    return model(input_ids=token_ids(), use_cache=False).logits


def test_both_names_of_the_cache_work(model):
    names = {"past_key_values", cache_argument(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            assert (decoded(model, name=name) - whole(model)).abs().max() < 1e-9
    output = model(input_ids=token_ids(), use_cache=True)
    assert cache_of(output).get_seq_length() == 40


def renamed(model, change):
    """Lets every layer call its attention with what ``change`` makes of the arguments: a transformers to come."""
    for layer in model.model.layers:
        attention = layer.self_attn
        inner = attention.forward
        attention.forward = lambda *args, inner=inner, **kwargs: inner(*args, **change(kwargs))


def moved(old, new):
    return lambda kwargs: {(new if name in old else name): value for name, value in kwargs.items()}


CACHES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", ["kv_store", "past", "cache_params"])
def test_a_cache_of_a_name_to_come_raises(model, name):
    renamed(model, moved(CACHES, name))
    with pytest.raises(TypeError, match=f"a cache as '{name}'.*anymla refresh"):
        decoded(model)
    with pytest.raises(TypeError, match=name):
        model.generate(token_ids(), max_new_tokens=3, pad_token_id=0)


def test_a_mask_of_a_name_to_come_raises(model):
    renamed(model, moved(("attention_mask",), "mask"))
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[0, :7] = 0
    with pytest.raises(TypeError, match="a tensor as 'mask'"):
        model(input_ids=token_ids(), attention_mask=padded)


def test_another_name_that_layers_have_today_works(model):
    renamed(model, moved(CACHES, "layer_past"))
    assert (decoded(model) - whole(model)).abs().max() < 1e-9


def test_settings_that_are_no_tensors_pass():
    cache = DynamicCache()
    arguments = {"use_cache": True, "output_hidden_states": None, "cache": cache, "past_key_values": None}
    assert take_cache(arguments) is cache
    assert arguments == {"use_cache": True, "output_hidden_states": None}
    with pytest.raises(TypeError, match="'extra'"):
        take_cache({"extra": torch.zeros(1)})


def test_an_export_for_vllm_raises_too(folder, tmp_path):
    anymla.convert(bundled(), tmp_path / "c", kv_cache=0.5, target="vllm", **FAST)
    anymla.export(tmp_path / "c", tmp_path / "e", to="vllm")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "e", trust_remote_code=True).eval()
    assert (decoded(exported) - whole(exported)).abs().max() < 1e-3
    renamed(exported, moved(CACHES, "kv_store"))
    with pytest.raises(TypeError, match="kv_store"):
        decoded(exported)


def bundled():
    from anymla.demo import bundled_model

    return bundled_model()


def test_a_newer_transformers_warns_once(folder, monkeypatch):
    monkeypatch.setattr(model_classes, "NEWEST_TESTED", "5.1")
    model_classes._warn_of_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"tested with transformers up to 5\.1.*anymla refresh") as found:
        AutoModelForCausalLM.from_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    assert len([each for each in found if "anymla" in str(each.message)]) == 1


def test_constraints_are_the_newest_tested():
    pinned = Path(__file__).parents[1].joinpath("constraints.txt").read_text()
    assert f"\ntransformers=={model_classes.NEWEST_TESTED}." in pinned


def test_refresh_replaces_old_modelling_files(folder, tmp_path, monkeypatch, capfd, without_anymla):
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "latent_attention.py").write_text("raise RuntimeError('old')\n")
    (old / "arguments.py").unlink()
    weights = (old / "model.safetensors").read_bytes()
    assert refresh(old) == ["arguments.py", "latent_attention.py"]
    assert refresh(old) == []
    assert (old / "model.safetensors").read_bytes() == weights
    assert difference_in_remote_code(old, without_anymla) < 1e-9
    said = run_main(["refresh", str(old)], monkeypatch, capfd)
    assert (said.code, said.out) == (0, f"{old} has the modelling files of this anymla already\n")
    source = folder.parent / "source"
    with pytest.raises(CheckpointError, match="no modelling files of anymla"):
        refresh(source)


def test_remote_code_without_anymla_decodes_right(folder, without_anymla):
    assert difference_in_remote_code(folder, without_anymla) < 1e-9


def difference_in_remote_code(folder, without_anymla):
    """Decode less prefill by the folder's own files, in a process where anymla was never imported."""
    code = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(3, 43)[None]
with torch.no_grad():
    whole = model(input_ids=ids, use_cache=False).logits
    out = model(input_ids=ids[:, :30], use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"
    late = model(input_ids=ids[:, 30:], **{name: out[name]}).logits
answer = (late - whole[:, 30:]).abs().max().item()
"""
    return without_anymla.run(code, folder=str(folder))


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[3, 4, 5], [6, 7]])
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.init_continuous_batching()


def test_a_static_cache_made_in_advance(model):
    """transformers knows one width for keys and values; the layers are made anew before the first token."""
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=64)
    cache.early_initialization(2, config.num_key_value_heads, 16, torch.float64, torch.device("cpu"))
    ids = token_ids()
    with torch.no_grad():
        steps = [model(input_ids=part, **{cache_argument(model): cache}).logits for part in ids.split(8, 1)]
    assert (torch.cat(steps, dim=1) - whole(model)).abs().max() < 1e-9
    attention = model.model.layers[0].self_attn
    held = cache.layers[0]
    assert (held.keys.shape[-1], held.values.shape[-1]) == (attention.kv_lora_rank, attention.qk_rope_head_dim)


def test_export_of_a_static_cache_is_refused(model):
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model.generation_config.cache_implementation = "static"
    parameters = inspect.signature(TorchExportableModuleWithStaticCache.__init__).parameters
    sizes = {"batch_size": 1, "max_cache_len": 32, "device": torch.device("cpu")}
    wrapped = TorchExportableModuleWithStaticCache(
        model, **{name: value for name, value in sizes.items() if name in parameters}
    )
    inputs = {"input_ids": torch.tensor([[5]]), "cache_position": torch.tensor([0])}
    with pytest.raises(NotImplementedError, match=r"torch\.export of one"):
        torch.export.export(wrapped, args=(), kwargs=inputs, strict=False)


def test_a_forward_pass_without_a_cache_exports(model):
    model.config.use_cache = False
    program = torch.export.export(model, args=(), kwargs={"input_ids": token_ids(), "use_cache": False}, strict=False)
    found = program.module()(input_ids=token_ids(), use_cache=False).logits
    assert (found - whole(model)).abs().max() < 1e-9


def test_a_model_that_transformers_itself_cannot_run_is_refused_at_once(folder, tmp_path, monkeypatch, capfd):
    def broken(self, *args, **kwargs):
        raise AttributeError("no 'image_outputs'")

    source = folder.parent / "source"
    monkeypatch.setattr(type(AutoModelForCausalLM.from_pretrained(source)), "forward", broken)
    command = ["convert", str(source), "-o", str(tmp_path / "out"), "--calibration-length", "64"]
    said = run_main(command, monkeypatch, capfd)
    assert said.code == 1
    assert re.fullmatch(r"error: transformers [\d.]+ cannot run \w+: no 'image_outputs'; install another.*\n", said.err)
    assert not (tmp_path / "out").exists()

"""Exports refused: one clear line, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import anymla
from anymla.demo import bundled_model
from anymla.errors import AnymlaError, CheckpointError, InfeasibleError, OutputError, UnsupportedModelError
from tests.export_check import FAST, TARGET, refused
from tests.families import ROPES, make_model, save_model
from tests.vision_models import tiny_vision_model


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("qwen2", {}, "biases"),
        ("qwen3", {"head_dim": 8}, "norms on queries and keys"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 24}, "window of 24"),
        ("llama", {"head_dim": 8, "rope_parameters": ROPES["yarn"] | {"rope_theta": 10000.0}}, "yarn"),
    ],
)
def test_planning_refuses_what_deepseek_cannot_hold(tmp_path, family, changes, word):
    source = save_model(make_model(family, torch.float32, **changes), tmp_path / "source")
    left = "it serves in transformers" if word.startswith("window") else "--target vllm can hold it"
    refused(
        UnsupportedModelError,
        tmp_path,
        lambda: anymla.convert(source, tmp_path / "out", **FAST, target="deepseek"),
        word,
        left,
    )


@pytest.mark.parametrize("settings", [{"rope": "uniform"}, {"rope": "rorope"}, {"rope_dims": 10}])
def test_planning_refuses_channels_off_the_grid(settings):
    with pytest.raises(InfeasibleError, match="--target deepseek"):
        anymla.plan(bundled_model(), **TARGET | settings)


def test_a_plan_from_elsewhere_keeps_to_the_grid(tmp_path):
    plan = anymla.plan(bundled_model(), **TARGET)
    wide = {"rope_dims": 8, "kv_rank": 24, "rope_choices": (), "rope_step": 2}
    changed = plan.model_copy(update={"layers": tuple(layer.model_copy(update=wide) for layer in plan.layers)})
    refused(
        InfeasibleError, tmp_path, lambda: anymla.convert(bundled_model(), tmp_path / "out", changed), "rope_step 2"
    )
    mixed = plan.model_copy(update={"layers": (plan.layers[0].model_copy(update=wide), *plan.layers[1:])})
    refused(
        InfeasibleError, tmp_path, lambda: anymla.convert(bundled_model(), tmp_path / "out", mixed), "one split for all"
    )


def test_refuses_a_free_plan(converted_folder, tmp_path):
    words = ("bias", "--target deepseek", "--to vllm")
    refused(UnsupportedModelError, tmp_path, lambda: anymla.export(converted_folder, tmp_path / "out"), *words)


def test_refuses_a_vision_language_model(tmp_path):
    save_model(tiny_vision_model("llava", torch.float32), tmp_path / "source")
    anymla.convert(tmp_path / "source", tmp_path / "model", kv_cache=0.5, **FAST)
    for target, word in {"deepseek": "vision-language", "gguf": "vision-language", "vllm": "sees images"}.items():
        call = lambda to=target: anymla.export(tmp_path / "model", tmp_path / "out", to)  # noqa: E731
        refused(UnsupportedModelError, tmp_path, call, word)


def test_refuses_what_is_not_converted(tmp_path):
    refused(CheckpointError, tmp_path, lambda: anymla.export(bundled_model(), tmp_path / "out"), "anymla convert")
    refused(AnymlaError, tmp_path, lambda: anymla.export(bundled_model(), tmp_path / "out", "onnx"), "--to onnx")
    refused(AnymlaError, tmp_path, lambda: anymla.export(bundled_model(), tmp_path / "out", pad="x"), "--pad x")


def test_refuses_float16_and_an_output_that_exists(stories, tmp_path):
    anymla.convert(bundled_model(), tmp_path / "half", **FAST | TARGET, dtype="float16")
    refused(UnsupportedModelError, tmp_path, lambda: anymla.export(tmp_path / "half", tmp_path / "out"), "bfloat16")
    refused(OutputError, tmp_path, lambda: anymla.export(stories.converted, tmp_path / "half"), "--overwrite")


@pytest.mark.parametrize(("to", "known"), [("deepseek", "float32 or bfloat16"), ("vllm", "bfloat16 or float16")])
def test_refuses_a_dtype_that_nobody_asked_for(tmp_path, to, known):
    anymla.convert(bundled_model(), tmp_path / "wide", **FAST | TARGET, dtype="float64")
    call = lambda: anymla.export(tmp_path / "wide", tmp_path / "out", to)  # noqa: E731
    refused(UnsupportedModelError, tmp_path, call, "is in float64", known)
    assert anymla.export(tmp_path / "wide", tmp_path / "out", to, dtype="float32").parity.tokens == 96


def with_config(folder, change):
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def described(fields, name):
    """What config.json says of the second layer, where ``name`` stands in it."""
    layer = fields["anymla"]["layers"][1]
    return next(part for part in (layer, layer["attention"], layer["latent"]) if name in part)


def with_tensor(folder, end, change):
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.self_attn.{end}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "no-dtype": (lambda at: with_config(at, lambda fields: fields.pop("dtype")), "dtype is None"),
    "strange-dtype": (lambda at: with_config(at, lambda fields: fields.update(dtype="int8")), "dtype"),
    "no-layers": (lambda at: with_config(at, lambda fields: fields["anymla"].update(layers=[])), "anymla does not"),
    "newer": (lambda at: with_config(at, lambda fields: fields["anymla"].update(version=99)), "update anymla"),
    "unknown-field": (
        lambda at: with_config(at, lambda fields: described(fields, "head_dim").update(x=1)),
        "no field x",
    ),
    **{
        f"{name}-{value}": (
            lambda at, name=name, value=value: with_config(
                at, lambda fields: described(fields, name).update({name: value})
            ),
            name if value in ("x", 0, None) or isinstance(value, float) or name == "module" else "1.self_attn.",
        )
        for name, value in (
            ("head_dim", "x"),
            ("head_dim", 0),
            ("num_kv_heads", 4.0),
            ("module", 3),
            ("scaling", None),
            ("kv_lora_rank", 27),
            ("num_heads", 4),
            ("rope_pairs", 3),
            ("qk_rope_head_dim", 2),
        )
    },
    "row-short": (lambda at: with_tensor(at, "kv_b_proj.weight", lambda weight: weight[:-1]), "kv_b_proj.weight is"),
    "flat": (lambda at: with_tensor(at, "q_proj.weight", lambda weight: weight.flatten()), "q_proj.weight is"),
    "pair": (lambda at: with_tensor(at, "channel_index", lambda index: index + 9), "channel_index"),
}


@pytest.mark.parametrize("target", ["deepseek", "vllm", "gguf"])
@pytest.mark.parametrize(("damage", "word"), DAMAGES.values(), ids=DAMAGES)
def test_refuses_broken_conversions(stories, tmp_path, damage, word, target):
    shutil.copytree(stories.converted, tmp_path / "model")
    damage(tmp_path / "model")
    call = lambda: anymla.export(tmp_path / "model", tmp_path / "out", target)  # noqa: E731
    refused(CheckpointError, tmp_path, call, word)

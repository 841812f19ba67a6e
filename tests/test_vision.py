"""Vision-language models: the text model converts inside the whole one, and images say what they said before."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.vision import _DEFAULTS, VISION
from anymla.evaluation.generation import stream_continuation
from anymla.modeling.latent_attention import LatentAttention
from tests.families import converted_layers, save_model
from tests.precision import Exact
from tests.vision_models import CASES, TEXT_MODELS, image_prompt, tiny_vision_config, tiny_vision_model

FAST = {"calibration_tokens": 512, "calibration_length": 32, "reconstruction_steps": 2}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
STEPS = 6
PER_TOKEN = ("input_ids", "token_type_ids", "mm_token_type_ids")


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, experts_implementation="eager", **options).eval()


@torch.no_grad()
def prefill(model, inputs):
    return model(**inputs, use_cache=False).logits


@torch.no_grad()
def decode(model, inputs):
    """The prompt with its image, then token by token from the cache."""
    ids = inputs["input_ids"]
    prompt = {name: value[:, :-STEPS] if name in PER_TOKEN else value for name, value in inputs.items()}
    output = model(**prompt, use_cache=True)
    logits = [output.logits]
    for step in ids[:, -STEPS:].split(1, dim=1):
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def save_tiny(folder, model_type, dtype, text_type=None):
    if model_type not in CONFIG_MAPPING or (text_type or VISION[model_type]) not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type} with {text_type}")
    model = tiny_vision_model(model_type, dtype, text_type)
    try:
        prefill(model, {"input_ids": torch.arange(5, 20)[None]})
    except AttributeError as error:  # Llama 4 in transformers 5.24.0
        pytest.skip(f"the installed transformers cannot run {model_type}: {error}")
    return save_model(model, folder / "source")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("model_type", "text_type"), [*((name, None) for name in CASES), *TEXT_MODELS])
def test_full_budget_is_the_original_with_images(tmp_path, model_type, text_type, dtype):
    source = save_tiny(tmp_path, model_type, dtype, text_type)
    inputs, other = (image_prompt(model_type, dtype, seed) for seed in (0, 1))
    with Exact() if dtype == torch.float64 else nullcontext():
        anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST)
        capped = {"attn_implementation": "eager"} if text_type == "gemma2" else {}  # older sdpa drops its soft-cap
        original, converted = load(source, **capped), load(tmp_path / "out")
        assert converted.dtype == dtype
        assert (prefill(original, inputs) - prefill(original, other)).abs().max() > 0.1  # it looks at the image
        for run in (prefill, decode):
            assert (run(converted, inputs) - run(original, inputs)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("model_type", CASES)
def test_half_budget(tmp_path, model_type):
    """It caches what the plan says, survives save and load, and its vision tower is the original's."""
    source, out = save_tiny(tmp_path, model_type, torch.float32), tmp_path / "out"
    plan = anymla.plan(source, kv_cache=0.5)
    anymla.convert(source, out, kv_cache=0.5, **FAST)
    original, converted, inputs = load(source), load(out), image_prompt(model_type, torch.float32)
    cache = converted(**inputs, use_cache=True).past_key_values
    for layer, planned in zip(cache.layers, plan.layers, strict=True):
        if planned is not None:
            numbers = (layer.keys.numel() + layer.values.numel()) / (2 * layer.keys.shape[-2])
            assert numbers == planned.cached_numbers
    paths = {name for name, module in converted.named_modules() if isinstance(module, LatentAttention)}
    assert paths == {layer.module for layer in converted_layers(converted.config)}
    state = converted.state_dict()
    kept = [name for name in original.state_dict() if not any(name.startswith(path) for path in paths)]
    assert any("vision" in name or "visual" in name for name in kept)
    assert all(torch.equal(state[name], original.state_dict()[name]) for name in kept)
    converted.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again) is type(converted)
    assert torch.equal(prefill(again, inputs), prefill(converted, inputs))
    assert prefill(again, inputs).isfinite().all()


@pytest.mark.parametrize("model_type", ["gemma3", "idefics3", "llava", "qwen2_5_vl"])
def test_generates_the_same_words_about_an_image(tmp_path, model_type):
    """Through transformers' own generate, which makes positions, masks and the cache itself."""
    source = save_tiny(tmp_path, model_type, torch.float64)
    inputs = image_prompt(model_type, torch.float64)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    with Exact():
        anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST)
        expected = load(source).generate(**inputs, **options)
        assert torch.equal(load(tmp_path / "out").generate(**inputs, **options), expected)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
def test_tied_embeddings_stay_tied(tmp_path, model_type):
    source = save_model(tiny_vision_model(model_type, torch.float64, tied=True), tmp_path / "source")
    inputs = image_prompt(model_type, torch.float64)
    with Exact():
        anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST)
        original, converted = load(source), load(tmp_path / "out")
        assert converted.lm_head.weight is converted.get_input_embeddings().weight
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
        assert (prefill(converted, inputs) - prefill(original, inputs)).abs().max() < TOLERANCE[torch.float64]


def test_folder_says_what_it_is_and_keeps_the_processor(tmp_path):
    source, out = save_tiny(tmp_path, "llava", torch.float32), tmp_path / "out"
    processor = {"preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}'}
    processor |= {
        "processor_config.json": '{"processor_class": "LlavaProcessor"}',
        "chat_template.jinja": "{{ hello }}",
    }
    for name, content in processor.items():
        (source / name).write_text(content)
    anymla.convert(source, out, kv_cache=0.5, **FAST)
    for name, content in processor.items():
        assert (out / name).read_text() == content
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "anymla_llava"
    assert config["architectures"] == ["AnymlaLlavaForConditionalGeneration"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_anymla.AnymlaLlavaConfig",
        "AutoModelForImageTextToText": "modeling_anymla.AnymlaLlavaForConditionalGeneration",
    }
    assert config["text_config"]["model_type"] == "llama"
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_loads_without_anymla(tmp_path, model_type, without_anymla):
    source = save_tiny(tmp_path, model_type, torch.float32)
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    inputs = image_prompt(model_type, torch.float32)
    expected = prefill(load(tmp_path / "out"), inputs)
    actual = without_anymla.logits(tmp_path / "out", inputs, auto="AutoModelForImageTextToText")
    assert torch.equal(actual, expected)


def test_commands_on_text(tmp_path, capsys):
    """inspect names both models; eval and generate work on the text model, before and after."""
    source, out = save_tiny(tmp_path, "qwen2_5_vl", torch.float32), tmp_path / "out"
    anymla.convert(source, out, kv_cache=0.5, **FAST)
    facts = anymla.inspect(source).to_dict()
    assert (facts["family"], facts["text_model_type"], facts["vision"]) == ("qwen2_5_vl", "qwen2_5_vl_text", True)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 40)
    before = anymla.evaluate(source, tmp_path / "text.txt", length=32)
    after = anymla.evaluate(out, tmp_path / "text.txt", source, length=32)
    assert after.cache_bytes_per_token == before.cache_bytes_per_token / 2
    assert after.kl > 0
    assert not anymla.inspect(out).supported
    stream_continuation(str(out), "Once", max_new_tokens=4, temperature=0.0, seed=0, device="cpu", dtype=None)
    assert capsys.readouterr().out.startswith("Once")


@pytest.mark.parametrize("text_type", _DEFAULTS)
def test_defaults_of_text_models_are_those_of_transformers(text_type):
    """A text_config may leave out what its config class knows: what is read without transformers is the same."""
    if text_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {text_type}")
    given = {"model_type": text_type}
    if text_type == "glm4v_moe_text":  # its own default, 42 of which rope turns half, holds no pairs
        given["head_dim"] = 128
    whole = CONFIG_MAPPING[text_type]().to_dict() | given
    sparse = read_model_spec({"model_type": "llava", "text_config": given})
    full = read_model_spec({"model_type": "llava", "text_config": whole})
    without_window = [
        [replace(layer, sliding_window=None, cache_window=None) for layer in read.attention_layers.values()]
        for read in (sparse, full)
    ]
    assert without_window[0] == without_window[1]
    for name in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"):
        assert getattr(sparse, name) == getattr(full, name)


@pytest.mark.parametrize("model_type", VISION)
def test_text_model_where_the_config_does_not_name_one(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")
    assert CONFIG_MAPPING[model_type]().text_config.model_type == VISION[model_type]


def test_flat_config_of_qwen2_vl(tmp_path):
    """The hub's first Qwen2-VL checkpoints keep the text model's fields beside the vision tower's config."""
    nested = tiny_vision_config("qwen2_vl").to_dict()
    flat = {**nested.pop("text_config"), **nested, "torch_dtype": "bfloat16", "dtype": None}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    flat.pop("rope_parameters")
    model_spec = read_model_spec(flat)
    assert model_spec.layers == read_model_spec(tiny_vision_config("qwen2_vl").to_dict()).layers
    assert (model_spec.dtype, model_spec.rope.rope_type) == ("bfloat16", "default")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert (
        AutoConfig.from_pretrained(tmp_path).text_config.num_key_value_heads
        == model_spec.layers[0].attention.num_kv_heads
    )


REFUSED = [
    ({"text_config": {"model_type": "mamba"}}, "the text model of 'llava': family 'mamba' cannot be converted"),
    ({"text_config": {"model_type": "deepseek_v3", "kv_lora_rank": 8}}, "already multi-head latent attention"),
    ({"text_config": {"model_type": "nonesuch"}}, "the text model of 'llava': family 'nonesuch' is not known"),
    ({"text_config": [1]}, "text_config must be an object"),
    ({"text_config": {"model_type": 7}}, "text_config: model_type must be a name"),
    ({"text_config": {"num_hidden_layers": 2, "hidden_size": "many"}}, "hidden_size"),
    ({"quantization_config": {"quant_method": "quanto"}}, "quantised by quanto"),
    ({"model_type": "qwen2_vl_text"}, "give the whole model"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[case[1] for case in REFUSED])
def test_refusals_name_the_text_model(tmp_path, changes, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | changes))
    inspection = anymla.inspect(tmp_path)
    assert not inspection.supported
    assert reason in inspection.reason

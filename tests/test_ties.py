"""A model whose config ties tensors that its files hold apart: converted and scored as stock transformers loads it."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import anymla
from anymla.errors import CheckpointError
from anymla.io.auto import auto_class
from anymla.io.streamed import StreamedModel
from anymla.model_run.stream import decoder_layers
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.family_models import SINCE, tiny_model
from tests.test_vision import prefill
from tests.vision_models import image_prompt, tiny_vision_model

FULL = FAST | {"kv_cache": 1.0}
WEIGHTS = "model.safetensors"


def stored(folder, edit):
    """Edits the tensors of a checkpoint of one file."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def fields(folder, **changes):
    """The config of a folder, with ``changes`` written to it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return json.loads(path.read_text())


def with_head(folder, head, name="lm_head.weight", embeddings="model.embed_tokens.weight"):
    """Stores a head beside the embeddings: other numbers, the same ones, or none."""
    other = {
        "different": lambda tensor: torch.randn(tensor.shape).to(tensor.dtype),
        "different in float32": lambda tensor: torch.randn(tensor.shape),
        "different in one number": lambda tensor: tensor.index_fill(0, torch.tensor([511]), 0.5),
        "equal": lambda tensor: tensor.clone(),
        "equal in bfloat16": lambda tensor: tensor.float() * (1 + 1e-6),
    }

    def edit(tensors):
        if head != "missing":
            tensors[name] = other[head](tensors[embeddings])

    torch.manual_seed(3)
    return stored(folder, edit)


@torch.no_grad()
def streamed_logits(folder, ids):
    """Logits of the model as conversion reads it, and that model."""
    source = StreamedModel(folder, dtype=None, device="cpu")
    layers = decoder_layers(source.model)
    with ExitStack() as everything:
        for layer in layers:
            everything.enter_context(source.layer(layer))
        everything.enter_context(source.on_demand(layers))
        return source.model(input_ids=ids, use_cache=False).logits, source


@pytest.mark.parametrize(
    ("head", "dtype", "tied"),
    [
        ("different", torch.float32, False),
        ("different in one number", torch.float32, False),
        ("equal", torch.float32, True),
        ("missing", torch.float32, True),
        ("different", torch.bfloat16, False),
        ("different in float32", torch.bfloat16, False),
        ("equal in bfloat16", torch.bfloat16, True),
    ],
)
def test_the_head_is_the_one_that_stock_transformers_loads(tmp_path, head, dtype, tied):
    model = make_model("llama", dtype, tie_word_embeddings=True)
    source, out = with_head(save_model(model, tmp_path / "source"), head), tmp_path / "out"
    report = anymla.convert(source, out, **FULL)
    stock, ids = AutoModelForCausalLM.from_pretrained(source).eval(), token_ids()
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied
    assert torch.equal(streamed_logits(source, ids)[0], logits(stock, ids))

    converted = AutoModelForCausalLM.from_pretrained(out).eval()
    expected, tolerance = logits(stock, ids), 1e-5 if dtype == torch.float32 else 0.1
    assert (logits(converted, ids) - expected).norm() < tolerance * expected.norm()  # with another head: more than all
    assert fields(out)["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(out / WEIGHTS)) == (not tied)
    assert torch.equal(converted.lm_head.weight, stock.lm_head.weight)
    assert [note for note in report.notes if "lm_head.weight" in note and "kept" in note] == [*report.notes]
    assert len(report.notes) == (not tied)
    assert json.loads((out / "conversion.json").read_text())["notes"] == list(report.notes)


def test_the_report_scores_the_original_that_stock_transformers_loads(tmp_path):
    source = with_head(
        save_model(make_model("qwen2", torch.float32, tie_word_embeddings=True), tmp_path / "s"), "different"
    )
    report = anymla.convert(source, tmp_path / "out", **FULL)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little cat. " * 100)
    measured = anymla.evaluate(tmp_path / "out", text, against=source, length=64)
    assert measured.kl < 1e-6
    assert report.after.kl < 1e-6
    assert report.before.perplexity == pytest.approx(report.after.perplexity, rel=1e-3)


OTHERS = {
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "bloom": ("lm_head.weight", "transformer.word_embeddings.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    "gpt_neox": ("lm_head.weight", "gpt_neox.embed_in.weight"),
    "biogpt": ("output_projection.weight", "biogpt.embed_tokens.weight"),
    "modernbert-decoder": ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    "gemma2": ("lm_head.weight", "model.embed_tokens.weight"),
    "mixtral": ("lm_head.weight", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("head", ["different", "equal", "missing"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_names_of_head_and_embeddings(tmp_path, family, head):
    if Version(transformers.__version__) < Version(since := SINCE.get(family, "5")):
        pytest.skip(f"transformers runs {family} since {since}")
    name, embeddings = OTHERS[family]
    tiny_model(family, torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    with_head(tmp_path, head, name, embeddings)
    found, source = streamed_logits(tmp_path, token_ids())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=source.model.config._attn_implementation)
    assert torch.equal(found, logits(stock.eval(), token_ids()))
    assert source.model.config.tie_word_embeddings == (head != "different")
    assert source.tied_away() == (set() if head == "different" else {name})


def test_two_names_in_the_files_for_one_tensor(tmp_path):
    """Stock transformers takes one of them, and so does conversion."""
    tiny_model("gpt2", torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    with_head(tmp_path, "equal", *OTHERS["gpt2"])
    stored(tmp_path, lambda tensors: tensors.update({"wte.weight": torch.ones(tensors["lm_head.weight"].shape)}))
    found, source = streamed_logits(tmp_path, token_ids())
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), token_ids()))
    assert source.notes == []


def test_embeddings_that_are_stored_as_the_head_alone(tmp_path):
    source, out = (
        save_model(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path / "source"),
        tmp_path / "out",
    )
    stored(source, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    anymla.convert(source, out, **FULL)
    stock, converted = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, out))
    assert (logits(converted, token_ids()) - logits(stock, token_ids())).abs().max() < 1e-3
    assert fields(out)["tie_word_embeddings"] is True


def test_an_untied_model_without_a_stored_head_is_refused(tmp_path):
    """Stock transformers makes up random numbers for it."""
    source = save_model(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path / "source")
    fields(source, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        anymla.convert(source, tmp_path / "out", **FULL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["different", "equal", "missing"])
@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen2_vl", "idefics3"])
def test_the_head_of_a_vision_language_model(tmp_path, model_type, head):
    source, out = (
        save_model(tiny_vision_model(model_type, torch.float32, tied=True), tmp_path / "source"),
        tmp_path / "out",
    )
    tensors = load_file(source / WEIGHTS)
    embeddings = next(name for name in tensors if name.endswith("embed_tokens.weight") and "vision" not in name)
    name = "language_model.lm_head.weight" if embeddings.startswith("language_model.") else "lm_head.weight"
    with_head(source, head, name, embeddings)
    anymla.convert(source, out, **FULL)
    auto, inputs = auto_class(model_type), image_prompt(model_type, torch.float32)
    stock, converted = (auto.from_pretrained(folder, experts_implementation="eager").eval() for folder in (source, out))
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == (head != "different")
    assert (prefill(converted, inputs) - prefill(stock, inputs)).abs().max() < 1e-3
    assert torch.equal(converted.lm_head.weight, stock.lm_head.weight)
    assert fields(out)["tie_word_embeddings"] == (head != "different")


@pytest.mark.parametrize("inside", [True, False])
def test_the_text_model_of_a_vision_language_model_says_otherwise(tmp_path, inside):
    """Its own flag is in text_config; stock transformers goes by the outer one."""
    source, out = (
        save_model(tiny_vision_model("llava", torch.float32, tied=True), tmp_path / "source"),
        tmp_path / "out",
    )
    config = fields(source)
    fields(source, text_config=config["text_config"] | {"tie_word_embeddings": inside})
    with_head(source, "different", "language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    anymla.convert(source, out, **FULL)
    auto, inputs = auto_class("llava"), image_prompt("llava", torch.float32)
    stock, converted = (auto.from_pretrained(folder).eval() for folder in (source, out))
    assert (prefill(converted, inputs) - prefill(stock, inputs)).abs().max() < 1e-3
    assert torch.equal(converted.lm_head.weight, stock.lm_head.weight)


@pytest.mark.parametrize("target", ["deepseek", "vllm"])
def test_exports_have_the_head_that_was_kept(tmp_path, target):
    source, out = (
        save_model(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path / "source"),
        tmp_path / "out",
    )
    with_head(source, "different")
    anymla.convert(source, out, kv_cache=0.5, target=target, **FAST)
    anymla.export(out, tmp_path / "served", to=target)  # compares logits with those of the converted model
    head = load_file(tmp_path / "served" / WEIGHTS)["lm_head.weight"]
    assert torch.equal(head, load_file(source / WEIGHTS)["lm_head.weight"])

"""Exports in llama.cpp, against transformers in float32.

Largest difference of a logit, in standard deviations of the logits, by dtype of weights and of the cache. bf16 and q8_0
hold weights to 8 bits, so a greedy token may change where two are near; with f32 and f16 weights none does here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.errors import ParityError
from anymla.exports.gguf import llama_cpp
from anymla.exports.gguf import writer as gguf_writer
from anymla.exports.gguf.llama_cpp import CELL
from anymla.exports.gguf.writer import write_gguf
from anymla.io.checkpoint import load_tokenizer
from tests.deepseek_models import SHAPES, make_deepseek
from tests.engines import llama
from tests.families import FAST, ROPES, make_model, save_model
from tests.gguf_files import Kind, write_gguf_of
from tests.tokenizers import KINDS, give_tokenizer

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(llama.MISSING, reason=f"no llama.cpp in {llama.ENVIRONMENT}: tests/engines/install-llama.sh"),
]
TOLERANCE = {
    ("f32", "f32"): 1e-4,
    ("f32", "f16"): 0.02,
    ("f16", "f16"): 0.03,
    ("bf16", "f16"): 0.2,
    ("q8_0", "f16"): 0.4,
}
NEW = 32
TEXTS = [
    "Once upon a time",
    "Hello  world!\n\nI'll  go 12345 67 x",
    "it's DON'T we'Re\t\ttab  \n  end ",
    "中文 кот é naïve 🙂 x",
    "a<|end|>b <tool> c</s>",
    "   lead, Zzz 3.14159e-10 -- f(x)=[y]{z}\r\nnext",
    "",
]


def ids(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 512, length).tolist()


def largest_error(ours: list[np.ndarray], theirs: list[np.ndarray], prompts: list[list[int]]) -> float:
    """Of the logits of the prompts, in their standard deviations."""
    pairs = [(a[: len(p)], b[: len(p)]) for a, b, p in zip(ours, theirs, prompts)]
    return max(float(np.abs(a - b).max() / b.std()) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "cache"), list(TOLERANCE), ids="-".join)
@pytest.mark.parametrize("neutral", [None, 20], ids=["norm", "neutral-norm"])
def test_every_dtype(tmp_path, neutral, dtype, cache):
    model, prompts = make_deepseek(neutral=neutral), [ids(5), ids(12), ids(22)]
    write_gguf(save_model(model, tmp_path / "model"), tmp_path / "m.gguf", dtype=dtype)
    found, logits = llama.run(tmp_path / "m.gguf", prompts, new=NEW, cache=cache)
    tokens, expected = llama.reference(model, prompts, NEW)
    assert largest_error(logits, expected, prompts) < TOLERANCE[dtype, cache]
    if (dtype, cache) in (("f32", "f32"), ("f32", "f16")):
        assert found["tokens"] == tokens


@pytest.mark.parametrize("shape", [shape for _, shape in SHAPES], ids=[name for name, _ in SHAPES])
def test_every_shape_in_small_steps(tmp_path, shape):
    # a step has at most 7 tokens, so prompts cross its border, and sequences of different lengths share steps
    model, prompts = make_deepseek(**shape), [ids(5), ids(1), ids(60)]
    write_gguf(save_model(model, tmp_path / "model"), tmp_path / "m.gguf", dtype="f32")
    found, logits = llama.run(tmp_path / "m.gguf", prompts, new=NEW, n_batch=7)
    tokens, expected = llama.reference(model, prompts, NEW)
    assert found["tokens"] == tokens
    assert largest_error(logits, expected, prompts) < TOLERANCE["f32", "f32"]


@pytest.mark.parametrize("cache", ["f16", "f32"])
def test_measured_cache(tmp_path, cache):
    model = make_deepseek()
    config = model.config
    write_gguf(save_model(model, tmp_path / "model"), tmp_path / "m.gguf", dtype="f32")
    found, _ = llama.run(tmp_path / "m.gguf", [ids(9)], new=NEW, cache=cache)
    before, after, tokens = found["bytes"][0]
    numbers = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    assert (after - before) / tokens == CELL + numbers * {"f16": 2, "f32": 4}[cache]


@pytest.mark.parametrize("kind", ["sentencepiece", *KINDS])
def test_tokenizers_give_the_same_ids(tmp_path, kind):
    folder = save_model(make_deepseek(), tmp_path / "model")
    if kind != "sentencepiece":
        give_tokenizer(folder, kind)
    write_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    found, _ = llama.run(tmp_path / "m.gguf", texts=TEXTS)
    tokenizer = load_tokenizer(folder)
    assert found["ids"] == [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module", params=[0.5, 0.3125], ids=["half", "third"])
def stories(request, tmp_path_factory):
    """The bundled model, converted under the limits of GGUF, and its plan."""
    folder = tmp_path_factory.mktemp("stories") / "converted"
    settings = {**FAST, "calibration_tokens": 8192, "calibration_length": 128}
    report = anymla.convert(bundled_model(), folder, kv_cache=request.param, target="gguf", **settings)
    return folder, report


PROMPTS = ("Once upon a time, there was a little girl", "Tom and his dog", "One day")


def prompts_of(folder: Path, texts: Sequence[str] = PROMPTS) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_stories_end_to_end(stories, tmp_path, monkeypatch, dtype):
    converted, report = stories
    monkeypatch.setattr(llama_cpp, "llama_python", lambda: llama.PYTHON)
    done = anymla.export(converted, tmp_path / "out", "gguf", dtype=dtype)
    assert done.parity.engine == "llama.cpp"
    layers, numbers = len(report.layers), report.layers[0].rope_dims + report.layers[0].kv_rank
    assert done.parity.cached_numbers == numbers
    file, prompts = tmp_path / "out" / "model.gguf", prompts_of(converted)
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    tokens, expected = llama.reference(model, prompts, NEW)
    found, logits = llama.run(file, prompts, new=NEW, cache="f16")
    assert largest_error(logits, expected, prompts) < TOLERANCE[dtype, "f16"]
    for before, after, steps in found["bytes"]:
        assert (after - before) / steps - CELL == 2 * numbers * layers  # 2 (r + 2K) layers: float16
    if dtype == "f32":
        assert found["tokens"] == tokens
        found, logits = llama.run(file, prompts, new=NEW)
        assert found["tokens"] == tokens
        assert largest_error(logits, expected, prompts) < TOLERANCE["f32", "f32"]
        decoded = load_tokenizer(converted).batch_decode(
            [prompt + own for prompt, own in zip(prompts, tokens)], skip_special_tokens=True
        )
        assert [text.strip() for text in found["text"]] == [text.strip() for text in decoded]


def test_a_long_prompt_in_small_steps(stories, tmp_path):
    converted, _ = stories
    anymla.export(converted, tmp_path / "out", "gguf", dtype="f32")
    text = bundled_text("valid").read_text()[:1500]
    prompts = [ids[:length] for ids, length in zip(prompts_of(converted, [text, text[400:], "Tom"]), (300, 97, 9))]
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    tokens, expected = llama.reference(model, prompts, NEW)
    for n_batch in (64, 37):
        found, logits = llama.run(tmp_path / "out" / "model.gguf", prompts, new=NEW, n_batch=n_batch)
        assert found["tokens"] == tokens
        assert largest_error(logits, expected, prompts) < TOLERANCE["f32", "f32"]


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_a_model_shaped_like_llama_3(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(llama_cpp, "llama_python", lambda: llama.PYTHON)
    shape = {"rope_parameters": {"rope_theta": 5e5, **ROPES["llama3"]}, "head_dim": 16, "rms_norm_eps": 1e-5}
    source = save_model(make_model("llama", torch.float32, tie_word_embeddings=tied, **shape), tmp_path / "model")
    give_tokenizer(source, "llama-bpe")
    anymla.convert(source, tmp_path / "converted", kv_cache=0.5, target="gguf", **FAST)
    done = anymla.export(tmp_path / "converted", tmp_path / "out", "gguf", dtype="f32")
    assert (done.parity.engine, done.parity.tokens) == ("llama.cpp", done.parity.of)
    found, _ = llama.run(tmp_path / "out" / "model.gguf", texts=TEXTS)
    tokenizer = load_tokenizer(source)
    assert found["ids"] == [tokenizer(text).input_ids for text in TEXTS]


def test_a_file_that_computes_something_else_is_refused(stories, tmp_path, monkeypatch):
    converted, _ = stories
    monkeypatch.setattr(llama_cpp, "llama_python", lambda: llama.PYTHON)
    monkeypatch.setattr(gguf_writer, "LATENT_EPS", 1e-7)
    with pytest.raises(ParityError, match="not the converted model"):
        anymla.export(converted, tmp_path / "out", "gguf", dtype="f32")
    assert list(tmp_path.iterdir()) == []


def test_an_openai_client_gets_the_same_completion(stories, tmp_path):
    converted, _ = stories
    anymla.export(converted, tmp_path / "out", "gguf", dtype="f32")
    prompt = PROMPTS[0]
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    tokens, _ = llama.reference(model, prompts_of(converted, [prompt]), NEW)
    with llama.server(tmp_path / "out" / "model.gguf") as url:
        body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "repeat_penalty": 1.0}
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
    assert text.strip() == load_tokenizer(converted).decode(tokens[0]).strip()


@pytest.mark.parametrize("kept", [2, 1])
def test_a_model_with_fewer_kv_heads_is_a_stock_one(tmp_path, kept):
    """``kv_heads`` writes a Llama that needs nothing of anymla: the usual converter's file, the same greedy tokens."""
    settings = {"kv_heads": kept, "calibration_tokens": 8192, "calibration_length": 128}
    anymla.run(bundled_model(), tmp_path / "out", steps=[{"kv_heads": settings}])
    model, prompts = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), prompts_of(tmp_path / "out")
    write_gguf_of(model, load_tokenizer(tmp_path / "out"), tmp_path / "m.gguf", Kind.F32)
    found, logits = llama.run(tmp_path / "m.gguf", prompts, new=NEW, cache="f32")
    tokens, expected = llama.reference(model, prompts, NEW)
    assert found["tokens"] == tokens
    assert largest_error(logits, expected, prompts) < TOLERANCE["f32", "f32"]
    config, (before, after, steps) = model.config, found["bytes"][0]
    numbers = 2 * kept * config.hidden_size // config.num_attention_heads * config.num_hidden_layers
    assert (after - before) / steps == CELL + 4 * numbers


@pytest.mark.parametrize(
    "step",
    [{"saap": {"neurons": 0.75, "multiple": 16}}, {"mka": {"remove": 1, "protect_first": 1, "protect_last": 1}}],
    ids=["fewer neurons", "fewer layers"],
)
def test_a_narrower_or_shallower_model_is_a_stock_one(tmp_path, step):
    """``saap`` and ``mka`` write a Llama, too."""
    text = {"calibration_tokens": 2048, "calibration_length": 128}
    anymla.run(bundled_model(), tmp_path / "out", steps=[{name: own | text for name, own in step.items()}])
    model, prompts = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), prompts_of(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    write_gguf_of(model, load_tokenizer(tmp_path / "out"), tmp_path / "m.gguf", Kind.F32)
    found, logits = llama.run(tmp_path / "m.gguf", prompts, new=NEW, cache="f32")
    tokens, expected = llama.reference(model, prompts, NEW)
    assert found["tokens"] == tokens
    assert largest_error(logits, expected, prompts) < TOLERANCE["f32", "f32"]

"""Exports in llama.cpp, against transformers in float32.

Largest difference of a logit, in standard deviations of the logits, by dtype of weights and of the cache. bf16 and q8_0
hold weights to 8 bits, so a greedy token may change where two are near; with f32 and f16 weights none does here.
"""

from __future__ import annotations

import numpy as np
import pytest

from anymla.exports.gguf import write_gguf
from anymla.io.checkpoint import load_tokenizer
from tests.deepseek_models import SHAPES, make_deepseek
from tests.engines import llama
from tests.families import save_model
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
CELL = 12  # bytes of a position and of its sequence, beside what is cached of it
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

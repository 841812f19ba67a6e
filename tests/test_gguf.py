"""The GGUF writer: what is in the file is read back with gguf's own reader."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from anymla.demo import bundled_model
from anymla.errors import AnymlaError, CheckpointError, RecipeError, UnsupportedModelError
from anymla.exports.gguf.writer import write_gguf
from anymla.io.checkpoint import load_tokenizer
from tests.deepseek_models import SHAPES, make_deepseek, save_deepseek
from tests.families import save_model
from tests.tokenizers import KINDS, TEMPLATE, byte_level, give_tokenizer

SUFFIX = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
ROUNDING = {"f32": 1e-7, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-7}  # of a row's largest number


def contents(file):
    """The keys of a GGUF file, and its tensors as (dtype, float32 numbers)."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {
        each.name: (each.tensor_type.name, dequantize(each.data, each.tensor_type)) for each in reader.tensors
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_deepseek(tmp_path_factory.mktemp("deepseek") / "model")


@pytest.mark.parametrize("dtype", list(SUFFIX))
@pytest.mark.parametrize("shape", [shape for name, shape in SHAPES if name != "27-layers"])
def test_every_weight_is_in_the_file(tmp_path, shape, dtype):
    model = make_deepseek(**shape)
    config, weights = model.config, model.state_dict()
    write_gguf(save_model(model, tmp_path / "model"), tmp_path / "m.gguf", dtype=dtype)
    _, tensors = contents(tmp_path / "m.gguf")
    heads, position_free, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    rope = shape.get("rope_parameters", {})
    expected = {"token_embd": weights["model.embed_tokens.weight"], "output_norm": weights["model.norm.weight"]}
    if not config.tie_word_embeddings:
        expected["output"] = weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        of = {name.split(f"layers.{layer}.")[1]: each for name, each in weights.items() if f"layers.{layer}." in name}
        keys, values = (
            of["self_attn.kv_b_proj.weight"].unflatten(0, (heads, -1)).split([position_free, config.v_head_dim], dim=1)
        )
        latent = of["self_attn.kv_a_proj_with_mqa.weight"].clone()
        latent[:rank] *= (config.rms_norm_eps / 1e-6) ** 0.5
        expected |= {
            f"blk.{layer}.{name}": each
            for name, each in {
                "attn_norm": of["input_layernorm.weight"],
                "attn_q": of["self_attn.q_proj.weight"] / (1 + 0.1 * np.log(rope.get("factor", 1.0))) ** 2,
                "attn_kv_a_mqa": latent,
                "attn_kv_a_norm": of["self_attn.kv_a_layernorm.weight"],
                "attn_k_b": keys.mT,
                "attn_v_b": values,
                "attn_output": of["self_attn.o_proj.weight"],
                "ffn_norm": of["post_attention_layernorm.weight"],
                "ffn_gate": of["mlp.gate_proj.weight"],
                "ffn_up": of["mlp.up_proj.weight"],
                "ffn_down": of["mlp.down_proj.weight"],
            }.items()
        }
    assert tensors.keys() == {f"{name}.weight" for name in expected}
    for name, tensor in expected.items():
        kind, numbers = tensors[f"{name}.weight"]
        assert numbers.shape == tuple(tensor.shape)
        error = np.abs(numbers - tensor.numpy()).max() / tensor.abs().max()
        assert error <= (1e-7 if tensor.dim() == 1 else ROUNDING[dtype]), name
        narrow = SUFFIX[dtype] if dtype != "q8_0" or tensor.shape[-1] % 32 == 0 else "F16"
        wide = tensor.dim() == 1 or (name.endswith("attn_kv_a_mqa") and dtype in ("f16", "q8_0"))
        assert kind == ("F32" if wide else narrow), name


def test_the_keys_llama_cpp_reads(folder, tmp_path):
    write_gguf(folder, tmp_path / "m.gguf", dtype="f16")
    keys, _ = contents(tmp_path / "m.gguf")
    own = {name.removeprefix("deepseek2."): value for name, value in keys.items() if name.startswith("deepseek2.")}
    assert keys["general.architecture"] == "deepseek2"
    assert own.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert own == {
        "block_count": 3,
        "leading_dense_block_count": 3,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "vocab_size": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "expert_feed_forward_length": 0,
        "expert_shared_count": 0,
    }


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_a_neutral_latent_norm_survives_small_dtypes(tmp_path, dtype):
    # at 2^-20 of their size the latent rows are below what float16, and the scale of a block of q8_0, can hold
    model = make_deepseek(neutral=20)
    write_gguf(save_model(model, tmp_path / "model"), tmp_path / "m.gguf", dtype=dtype)
    _, tensors = contents(tmp_path / "m.gguf")
    for number, layer in enumerate(model.model.layers):
        kind, rows = tensors[f"blk.{number}.attn_kv_a_mqa.weight"]
        assert kind == "F32"
        torch.testing.assert_close(torch.from_numpy(rows.copy()), layer.self_attn.kv_a_proj_with_mqa.weight.data)


def test_sentencepiece_tokenizer(folder, tmp_path):
    write_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    keys, _ = contents(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(bundled_model())
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(512))
    assert keys["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]  # unknown, control, control, byte, byte
    assert keys["tokenizer.ggml.token_type"][300] == 1
    scores = keys["tokenizer.ggml.scores"]
    assert scores[259:511] == sorted(scores[259:511], reverse=True)  # in the order of the merges
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.add_bos_token"] and not keys["tokenizer.ggml.add_eos_token"]
    assert keys["tokenizer.ggml.add_space_prefix"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_byte_level_tokenizers_are_known_by_their_split(tmp_path, kind):
    folder = give_tokenizer(save_deepseek(tmp_path / "model"), kind)
    write_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    keys, _ = contents(tmp_path / "m.gguf")
    tokenizer = byte_level(kind)
    count = len(tokenizer)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == kind
    assert keys["tokenizer.ggml.tokens"][:count] == tokenizer.convert_ids_to_tokens(range(count))
    types = keys["tokenizer.ggml.token_type"]
    assert types[tokenizer.convert_tokens_to_ids("<|end|>")] == 3
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == 4
    assert types[count:] == [5] * (512 - count)  # the model has more tokens than the tokenizer
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert keys["tokenizer.ggml.add_bos_token"] == KINDS[kind][3]
    assert keys["tokenizer.chat_template"] == TEMPLATE


def test_all_ends_of_generation(folder, tmp_path):
    (copy := tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    write_gguf(copy, tmp_path / "m.gguf", dtype="f32")
    keys, _ = contents(tmp_path / "m.gguf")
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (2, 7)


REFUSED = [
    ({"attention_bias": True}, "biases"),
    ({"q_lora_rank": 8}, "q_lora_rank"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"first_k_dense_replace": 2}, "experts"),
    ({"rope_interleave": False}, "interleaved"),
    ({"model_type": "llama"}, "llama"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_arch_cannot_say_is_refused(folder, tmp_path, changes, reason):
    (copy := tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=reason):
        write_gguf(copy, tmp_path / "m.gguf", dtype="f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_unknown_split_is_refused(tmp_path):
    folder = give_tokenizer(save_deepseek(tmp_path / "model"), "qwen2")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("(?i:'s|'t", "(?i:'s|'x"))
    with pytest.raises(UnsupportedModelError, match="no pre-tokenizer is known"):
        write_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_merges_that_no_sentencepiece_model_has_are_refused(folder, tmp_path):
    (copy := tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    spec = json.loads((copy / "tokenizer.json").read_text())
    spec["model"]["merges"].pop(10)
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedModelError, match="SentencePiece"):
        write_gguf(copy, tmp_path / "m.gguf", dtype="f32")


def test_numbers_too_large_for_the_dtype(tmp_path):
    model = make_deepseek()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down.*F16"):
        write_gguf(folder, tmp_path / "m.gguf", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    write_gguf(folder, tmp_path / "m.gguf", dtype="bf16")


def test_the_extra_is_named_where_it_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"pip install 'anymla\[gguf\]'"):
        write_gguf(folder, tmp_path / "m.gguf", dtype="f32")


def test_an_unknown_dtype(folder, tmp_path):
    with pytest.raises(AnymlaError, match="q4_0"):
        write_gguf(folder, tmp_path / "m.gguf", dtype="q4_0")

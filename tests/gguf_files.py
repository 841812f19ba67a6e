"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from anymla.exports.gguf.tokenizer import add_tokenizer
from tests.families import SIZES, make_model
from tests.tokenizers import byte_level

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = SIZES | WIDE | {"head_dim": 64, "num_hidden_layers": 1}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
Kind = gguf.GGMLQuantizationType


def random_blocks(kind, count):
    """Blocks of random bytes that stand for numbers of moderate size."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    random, kept = np.random.default_rng(0), []
    while sum(map(len, kept)) < count:
        blocks = random.integers(0, 256, (4096, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            numbers = dequantize(blocks, kind).reshape(len(blocks), -1)
            kept.append(blocks[np.isfinite(numbers).all(1) & (np.abs(numbers).max(1) < 10)])
    return np.concatenate(kept)[:count]


def stored(numbers, kind):
    """``numbers`` as tensors of that kind hold them; random ones where gguf cannot quantise."""
    if kind == Kind.F32:
        return numbers
    try:
        return quantize(numbers, kind)
    except NotImplementedError:
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        return random_blocks(kind, numbers.size // block).reshape(*numbers.shape[:-1], -1)


def interleaved(weight, heads):
    """llama.cpp's order of a head's dims, in which the two of a rope pair are neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf_model(file, kind, family="llama", *, extra=None, keys=None, splits="smollm", **changes):
    """Writes a random model whose matrices are of that kind; returns the model, with other numbers in them."""
    model = make_model(family, torch.float32, **SHAPE | changes)
    write_gguf_of(model, byte_level(splits), file, kind, extra=extra, keys=keys)
    return model


def write_gguf_of(model, tokenizer, file, kind, *, extra=None, keys=None):
    """Writes a stock model whose matrices are of that kind."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, tokenizer, config.vocab_size, [tokenizer.eos_token_id])
    for name, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{architecture}.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            numbers = interleaved(numbers, config.num_attention_heads)
        elif architecture == "llama" and "k_proj" in name:
            numbers = interleaved(numbers, config.num_key_value_heads)
        stem, _, suffix = name.rpartition(".")
        of = Kind.F32 if numbers.ndim == 1 else kind
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", stored(numbers, of), raw_dtype=of)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

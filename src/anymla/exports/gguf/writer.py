"""A dense DeepSeek-V3 folder as one GGUF file of llama.cpp's arch ``deepseek2``, which caches the latent alone.

Shapes: h hidden, H heads, r latent, n position-free and p rope dims of a key, v of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from anymla.errors import CheckpointError, OutputError, RecipeError, UnsupportedModelError
from anymla.exports.gguf.tokenizer import add_tokenizer
from anymla.io.checkpoint import check_weights, load_tokenizer, safe_config
from anymla.io.config import read_object
from anymla.io.safetensors import Stored, durable, read_header

if TYPE_CHECKING:
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
LATENT_EPS = 1e-6  # of kv_a_layernorm, which transformers writes into the code and llama.cpp takes from the file
OUTER = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Weight:
    """One tensor of the file: its name, its shape, and how its numbers are read."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_gguf(deepseek: Path, file: Path, *, dtype: GgufDtype) -> None:
    """Writes the model and the tokenizer of ``deepseek`` to ``file``, whole or not at all, one tensor at a time.

    Norms are float32 always. ``attn_kv_a_mqa`` is float32 in f16 and q8_0 files: where the latent's norm is neutralised
    its rows are 2^-14 or less of their natural size, which is outside of what float16, also as the scale of a block of
    q8_0, can hold. With q8_0, rows that are no multiple of 32 numbers are f16.

    Args:
        deepseek: a dense ``DeepseekV3ForCausalLM`` checkpoint: no experts, no biases, no query latent.
        file: the file to write.
        dtype: of the matrices.

    Raises:
        UnsupportedModelError: llama.cpp's ``deepseek2``, or its tokenizers, cannot say what the folder holds.
        CheckpointError: the folder is no such checkpoint, or a number is too large for ``dtype``.
        RecipeError: an unknown dtype, or the package ``gguf`` is missing.
        OutputError: the file cannot be written.
    """
    if dtype not in get_args(GgufDtype):
        raise RecipeError(f"--dtype {dtype} is not one of {', '.join(get_args(GgufDtype))}")
    require_gguf()
    from gguf import GGUFWriter

    config, tokenizer = safe_config(deepseek).to_dict(), load_tokenizer(deepseek)
    check_expressible(config)
    unfinished = file.with_name(f".{file.name}.partial")
    writer = GGUFWriter(unfinished, "deepseek2")
    try:
        _add_settings(writer, config, file.stem, dtype)
        add_tokenizer(writer, tokenizer, config["vocab_size"], _ends(deepseek, config))
        _write_weights(writer, file_weights(deepseek, config), dtype)
        unfinished.replace(file)
    except OSError as error:
        raise OutputError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def require_gguf() -> None:
    """Refuses to begin without the package that writes the file.

    Raises:
        RecipeError: the package ``gguf`` is missing.
    """
    if find_spec("gguf") is None:
        raise RecipeError("--to gguf needs the package gguf: pip install 'anymla[gguf]'")


def check_expressible(config: Mapping[str, Any]) -> None:
    """Refuses a config that says what ``deepseek2`` of llama.cpp, or this writer, cannot.

    Raises:
        UnsupportedModelError: names the first such field.
    """
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    reasons = {
        f"model_type is {config.get('model_type')} and not deepseek_v3": config.get("model_type") != "deepseek_v3",
        "it has experts (first_k_dense_replace is below num_hidden_layers)": (config.get("first_k_dense_replace") or 0)
        < config.get("num_hidden_layers", 0),
        "queries go through a latent of their own (q_lora_rank)": config.get("q_lora_rank") is not None,
        "attention has biases (attention_bias)": bool(config.get("attention_bias")),
        f"the MLP's activation is {config.get('hidden_act')} and not silu": config.get("hidden_act") != "silu",
        "rope pairs are not interleaved (rope_interleave)": config.get("rope_interleave") is False,
        f"rope is of type {kind}, and only default and linear are written": kind not in ("default", "linear"),
        "rope turns a part of the rope dims only (partial_rotary_factor)": rope.get("partial_rotary_factor", 1) != 1,
        "qk_rope_head_dim is odd or zero": not config.get("qk_rope_head_dim") or config["qk_rope_head_dim"] % 2 > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(f"llama.cpp's deepseek2 cannot hold this model: {reason}")


def _add_settings(writer: GGUFWriter, config: Mapping[str, Any], name: str, dtype: GgufDtype) -> None:
    """The keys that ``llama_model_deepseek2`` reads. The last three it needs: no query latent, no experts."""
    import gguf

    rank, rope_dims = config["kv_lora_rank"], config["qk_rope_head_dim"]
    rope, kind = config["rope_parameters"], gguf.LlamaFileType
    files = {"f32": kind.ALL_F32, "f16": kind.MOSTLY_F16, "bf16": kind.MOSTLY_BF16, "q8_0": kind.MOSTLY_Q8_0}
    writer.add_name(name)
    writer.add_file_type(files[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_leading_dense_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # the latent is one key head, absorbed
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope_dims)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope_dims)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(rope_dims)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_q_lora_rank(0)
    writer.add_expert_feed_forward_length(0)
    writer.add_expert_shared_count(0)


def query_scale(config: Mapping[str, Any]) -> float:
    """Returns what queries are multiplied by, for ``deepseek2`` takes any scaled rope for YaRN in its softmax scale."""
    return float((1 + 0.1 * math.log(config["rope_parameters"].get("factor") or 1.0)) ** -2)


def latent_scale(config: Mapping[str, Any]) -> float:
    """Returns what latents are multiplied by, so that the file's one eps acts as LATENT_EPS on them."""
    return float((config["rms_norm_eps"] / LATENT_EPS) ** 0.5)


def _ends(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The ids at which generation ends."""
    path = folder / "generation_config.json"
    ids = (read_object(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def file_weights(folder: Path, config: Mapping[str, Any]) -> list[Weight]:
    """All tensors of the file. kv_b_proj [H(n+v),r] becomes attn_k_b [H,r,n] and attn_v_b [H,v,r]."""
    stored = {name: entry for path in check_weights(folder) for name, entry in read_header(path).items()}

    def of(name: str) -> Stored:
        if name not in stored:
            raise CheckpointError(f"{folder} lacks the tensor {name}")
        return stored[name]

    scales = {"attn_q": (None, query_scale(config)), "attn_kv_a_mqa": (config["kv_lora_rank"], latent_scale(config))}
    tied = config["tie_word_embeddings"]
    weights = [
        Weight(f"{ours}.weight", (entry := of(name)).shape, entry.read)
        for name, ours in OUTER.items()
        if not (tied and ours == "output")
    ]
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, short in INNER.items():
            entry = of(f"{theirs}{name}.weight")
            scale = scales.get(short)
            read = entry.read if scale is None else partial(_scaled, entry, *scale)
            weights.append(Weight(f"{ours}{short}.weight", entry.shape, read))
        name = f"{theirs}self_attn.kv_b_proj.weight"
        weights += _decoders(f"{folder}: {name}", of(name), ours, config)
    return weights


def _scaled(entry: Stored, rows: int | None, factor: float) -> Tensor:
    weight = entry.read().double()
    weight[:rows] *= factor
    return weight


def _decoders(place: str, entry: Stored, block: str, config: Mapping[str, Any]) -> list[Weight]:
    """The two parts of kv_b_proj."""
    heads, rank, position_free, value = (
        config[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )
    if entry.shape != (rows := heads * (position_free + value), rank):
        raise CheckpointError(f"{place} is {entry.shape} and not {(rows, rank)}")

    def parts() -> Tensor:
        return entry.read().view(heads, position_free + value, rank)

    return [
        Weight(f"{block}attn_k_b.weight", (heads, rank, position_free), lambda: parts()[:, :position_free].mT),
        Weight(f"{block}attn_v_b.weight", (heads, value, rank), lambda: parts()[:, position_free:]),
    ]


def _write_weights(writer: GGUFWriter, weights: list[Weight], dtype: GgufDtype) -> None:
    """First what there will be, then the numbers."""
    import numpy
    from gguf.quants import quant_shape_to_byte_shape

    kinds = [_kind(weight, dtype) for weight in weights]
    for weight, kind in zip(weights, kinds, strict=True):
        shape = quant_shape_to_byte_shape(weight.shape, kind)
        writer.add_tensor_info(weight.name, shape, numpy.dtype(numpy.uint8), int(numpy.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for weight, kind in zip(weights, kinds, strict=True):
            writer.write_tensor_data(_encoded(weight, kind))
        for stream in writer.fout or ():
            durable(stream)
    finally:
        writer.close()


def _kind(weight: Weight, dtype: GgufDtype) -> GGMLQuantizationType:
    """How a tensor is stored: as ``dtype``, or wider (:func:`write_gguf` says why)."""
    from gguf import GGMLQuantizationType as Kind

    if len(weight.shape) == 1:
        return Kind.F32
    if dtype in ("f16", "q8_0") and weight.name.endswith("attn_kv_a_mqa.weight"):
        return Kind.F32
    if dtype == "q8_0" and weight.shape[-1] % 32:
        return Kind.F16
    return Kind[dtype.upper()]


def _encoded(weight: Weight, kind: GGMLQuantizationType) -> numpy.ndarray[Any, Any]:
    """The bytes of a tensor.

    Raises:
        CheckpointError: it holds a number that the dtype does not.
    """
    import numpy
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    numbers = weight.read().float().contiguous().numpy()
    largest = numpy.abs(numbers).max() / (127 if kind is Kind.Q8_0 else 1)
    if not numpy.isfinite(largest) or (kind in (Kind.F16, Kind.Q8_0) and largest > numpy.finfo(numpy.float16).max):
        raise CheckpointError(f"{weight.name} holds numbers that {kind.name} cannot: choose another --dtype")
    stored: numpy.ndarray[Any, Any] = quantize(numbers, kind).view(numpy.uint8)
    return stored

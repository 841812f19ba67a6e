"""A converted model as a stock dense DeepseekV3ForCausalLM checkpoint, for engines that know nothing of anymla.

DeepSeek's block has no biases, one shared rope key whose frequencies are a geometric series from 1, a norm on the
latent and one eps. What it cannot say is refused here; what it says otherwise is folded into weights, exactly
(docs/exporting.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.positions import read_rope
from anymla.errors import UnsupportedModelError
from anymla.exports.converted import Converted, Layer, read_converted
from anymla.exports.fold import NORM_EPS, READ, Sizes, deepseek_attention
from anymla.exports.gauge import Gauge, regauged
from anymla.exports.padding import padded
from anymla.exports.weight_files import write_weights
from anymla.io.checkpoint import copy_companions, safe_config
from anymla.layouts import plain_pairs, target_refusal

CONVERT = "convert the original with --target deepseek, or export --to vllm"
BEYOND = (  # what DeepSeek's attention does not do and nothing folds away
    *("adds_residual", "clip", "gate", "norms", "output_norm", "position_bias", "query_gain", "sinks", "softcap"),
    *("temperature", "value_norm"),
)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class DeepSeekShape:
    """What all layers have in common: sizes as written, and the base of their rope."""

    sizes: Sizes
    theta: float


def write_deepseek(
    converted: Path,
    folder: Path,
    *,
    pad: str = "none",
    dtype: str | None = None,
    gauges: Callable[[Path], Sequence[Gauge]] | None = None,
) -> DeepSeekShape:
    """Writes the converted model of ``converted`` into ``folder``, which is there and empty.

    Args:
        converted: what ``anymla convert --target deepseek`` wrote.
        folder: where config, weights and tokenizer go.
        pad: with zeros, exactly, up to sizes that kernels need: 'cpu' rank 512 and rope 64, for vLLM's on CPUs; 'cuda'
            rope 64, nope 64 or 128, value 128, for prefill on GPUs; 'full' both, for FlashMLA and TensorRT-LLM.
        dtype: of the weights, not float16, which has no room for the latent norm. Default: the converted model's.
        gauges: chooses those of the cache, one per layer; by default it holds what the converted model's does.

    Raises:
        UnsupportedModelError: DeepSeek's layout cannot hold the model; the message says what stops it.
        CheckpointError: ``converted`` is no converted model, or broken.
    """
    source = read_converted(converted)
    _check(source)
    source = source if gauges is None else regauged(source, gauges(converted))
    dtype = dtype or str(source.config["dtype"])
    shape = _shape(source, pad)
    stream = (NORM_EPS / float(source.config["rms_norm_eps"])) ** 0.5  # the residual stream, scaled, has that eps
    write_weights(folder, _tensors(source, shape, stream, getattr(torch, dtype)))
    _config(source, shape, dtype).save_pretrained(folder)
    copy_companions(source.folder, folder)
    return shape


def _check(source: Converted) -> None:
    """Refuses what DeepSeek's layout cannot hold, but for sizes."""
    _check_model(source)
    for layer in source.layers:
        _check_layer(source, layer)


def _shape(source: Converted, pad: str) -> DeepSeekShape:
    """What the layers agree on."""
    grids = {_grid(source, layer) for layer in source.layers}
    if len(grids) > 1:
        raise UnsupportedModelError(
            f"{source.folder}: its layers differ in rank or rope channels, DeepSeek's have one of each: {CONVERT}"
        )
    first = source.layers[0]
    d = first.spec.head_dim
    sizes = Sizes(first.latent.kv_lora_rank, first.latent.qk_rope_head_dim, d, d)
    sizes = padded(source.folder, sizes, pad)
    return DeepSeekShape(sizes, _theta(source, first, sizes, grids.pop()[2]))


def _check_model(source: Converted) -> None:
    """Refuses what planning for this layout refuses, in a model that was planned without it."""
    names = {"model_type": source.model_type, "kv_lora_rank": None}  # the original's
    model_spec = read_model_spec(safe_config(source.folder).to_dict() | names)
    if (reason := target_refusal("deepseek", model_spec, static_norms=True)) is not None:
        other = "" if target_refusal("vllm", model_spec) else ": export --to vllm"
        raise UnsupportedModelError(f"{source.folder}: {reason}{other}")


def _check_layer(source: Converted, layer: Layer) -> None:
    place = f"{source.folder}: layer {layer.index}"
    if others := [name for name in BEYOND if getattr(layer.spec, name)]:
        raise UnsupportedModelError(
            f"{place} has {others[0]}, which DeepSeek's attention does not have: export --to vllm"
        )
    if layer.spec.rope_table not in ("halves", "repeated", "either"):
        raise UnsupportedModelError(f"{place} has no rope that DeepSeek's attention has: export --to vllm")
    for name, what in (("q_proj", "queries"), ("kv_a_proj_with_mqa", "keys or the latent"), ("o_proj", "output")):
        stored = source.stored.get(f"{layer.module}.{name}.bias")
        if stored is not None and stored.read().any():
            raise UnsupportedModelError(f"{place} has a bias on its {what}, DeepSeek's attention has none: {CONVERT}")


def _grid(source: Converted, layer: Layer) -> tuple[int, int, int]:
    """(rank, rope dims, step): channel i turns with the frequency of pair i * step."""
    rope = layer.latent.qk_rope_head_dim
    turns = source.tensor(f"{layer.module}.channel_index")[: rope // 2].sort().values
    step = int(turns[-1]) // max(1, len(turns) - 1) if len(turns) else 0
    plain = plain_pairs(read_rope(source.config), layer.spec.rope_pairs)
    if not len(turns) or not turns.equal(torch.arange(len(turns)) * max(step, 1)) or turns[-1] >= plain:
        raise UnsupportedModelError(
            f"{source.folder}: layer {layer.index}: its rope frequencies are no geometric series from 1: {CONVERT}"
        )
    return layer.latent.kv_lora_rank, rope, max(step, 1)


def _theta(source: Converted, layer: Layer, sizes: Sizes, step: int) -> float:
    """The base with which plain rope over R' dims has the channels' frequencies at their places.

    Pair i of P turns with base^(-i/P), channel j with i = j * step; it takes place j m of R'/2, m = R'/2 // K.
    """
    channels, places = layer.latent.qk_rope_head_dim // 2, sizes.rope // 2
    power = step * places / (layer.spec.rope_pairs * (places // channels))
    return float(source.config["rope_parameters"]["rope_theta"] ** power)


def _tensors(source: Converted, shape: DeepSeekShape, stream: float, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """All weights, a layer at a time; the residual stream is ``stream`` times the source's.

    Factors of the family (Granite's) are in weights then: of embeddings and what is added to the stream, and of logits.
    """
    config = source.config
    added = stream * float(config.get("residual_multiplier") or 1.0)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    written = source.scaled(embedding, stream * float(config.get("embedding_multiplier") or 1.0))
    yield _cast({embedding: written}, dtype)
    given = head if head in source.stored else embedding  # tied, but written as its own: not all engines tie it
    yield _cast({head: source.scaled(given, 1 / float(config.get("logits_scaling") or 1.0))}, dtype)
    yield _cast({"model.norm.weight": source.scaled("model.norm.weight", 1)}, dtype)
    for layer in source.layers:
        prefix = f"model.layers.{layer.index}."
        norms = {name: source.scaled(f"{prefix}{name}", 1) for name in NORMS}
        attention = source.tensors(layer, READ)
        folded = deepseek_attention(attention, layer, shape.sizes, norms[NORMS[0]].double(), dtype)
        folded["o_proj.weight"] *= added
        made = norms | _mlp(source, f"{prefix}mlp.", added)
        made |= {f"self_attn.{name}": tensor for name, tensor in folded.items()}
        yield _cast({f"{prefix}{name}": tensor for name, tensor in made.items()}, dtype)


def _mlp(source: Converted, prefix: str, added: float) -> dict[str, Tensor]:
    """The gated MLP; Phi-3's gate and up projection are one matrix."""
    if (fused := f"{prefix}gate_up_proj.weight") in source.stored:
        gate, up = source.scaled(fused, 1).chunk(2)
    else:
        gate, up = (source.scaled(f"{prefix}{name}_proj.weight", 1) for name in ("gate", "up"))
    down = source.scaled(f"{prefix}down_proj.weight", added)
    return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _config(source: Converted, shape: DeepSeekShape, dtype: str) -> Any:
    """A dense DeepSeek-V3: every layer before the first with experts, of which there are none."""
    from transformers import DeepseekV3Config

    taken = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes, heads = shape.sizes, source.layers[0].spec.num_heads
    return DeepseekV3Config(
        **{name: source.config[name] for name in taken},
        **{name: source.config.get(name) for name in ids},
        architectures=["DeepseekV3ForCausalLM"],
        dtype=dtype,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=sizes.rank,
        qk_rope_head_dim=sizes.rope,
        qk_nope_head_dim=sizes.nope,
        v_head_dim=sizes.value,
        first_k_dense_replace=source.config["num_hidden_layers"],
        moe_intermediate_size=source.config["intermediate_size"],
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
        hidden_act="silu",
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        rope_interleave=True,
        attention_bias=False,
        tie_word_embeddings=False,
    )

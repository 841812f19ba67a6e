"""A GGUF file read back: every tensor beside what was to be written, and a stock DeepSeek model with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import ParityError
from anymla.exports.gguf.llama_cpp import TOLERANCE
from anymla.exports.gguf.writer import INNER, OUTER, GgufDtype, file_weights, latent_scale, query_scale
from anymla.exports.parity import Parity, check_parity, load_stock
from anymla.io.checkpoint import safe_config

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32  # numbers of q8_0 that share a scale


def check_file(converted: Path, deepseek: Path, file: Path, *, dtype: GgufDtype) -> Parity:
    """Compares the weights that ``file`` holds, in the stock model of ``deepseek``, with the converted model.

    Raises:
        ParityError: a tensor is not what was to be written, or logits or tokens differ by more than the tolerance.
    """

    def load(folder: Path) -> Any:
        config = safe_config(folder).to_dict()
        model = load_stock(folder)
        model.load_state_dict(_stock_weights(_read(folder, config, file), config))
        return model

    return check_parity(converted, deepseek, load=load, tolerance=TOLERANCE[dtype])


def _read(deepseek: Path, config: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The file's tensors in float32, each held to what ``deepseek`` has there."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    weights = file_weights(deepseek, config)
    if others := stored.keys() ^ {weight.name for weight in weights}:
        raise ParityError(f"{file.name} has a missing or an extra tensor: {min(others)}; nothing was written")
    found = {}
    for weight in weights:
        tensor, expected = stored[weight.name], weight.read().float()
        numbers = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float()
        kind = tensor.tensor_type.name
        if numbers.shape != expected.shape or not ((numbers - expected).abs() <= _rounding(expected, kind)).all():
            raise ParityError(
                f"{weight.name} in {file.name} is not what was to be written as {kind}; nothing was written"
            )
        found[weight.name] = numbers
    return found


def _rounding(numbers: Tensor, kind: str) -> Tensor:
    """The most by which a tensor type changes each number."""
    size = numbers.abs()
    if kind == "Q8_0":  # to half a step, of which 127 make a block's largest number; and the step to float16
        largest: Tensor = size.unflatten(-1, (-1, BLOCK)).amax(-1).repeat_interleave(BLOCK, dim=-1)
        return largest * (0.5001 / 127 + 2.0**-11) + 127 * 2.0**-25
    share, least = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[kind]
    allowed: Tensor = size * share + least
    return allowed


def _stock_weights(found: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same under DeepSeek's names, without the factors that llama.cpp wants."""
    import torch

    made = {name: found[f"{ours}.weight"] for name, ours in OUTER.items()}
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        made |= {f"{prefix}{name}.weight": found[f"{block}{short}.weight"] for name, short in INNER.items()}
        made[f"{prefix}self_attn.q_proj.weight"] /= query_scale(config)
        made[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"][: config["kv_lora_rank"]] /= latent_scale(config)
        heads = torch.cat([found[f"{block}attn_k_b.weight"].mT, found[f"{block}attn_v_b.weight"]], dim=1)
        made[f"{prefix}self_attn.kv_b_proj.weight"] = heads.flatten(0, 1)
    return made

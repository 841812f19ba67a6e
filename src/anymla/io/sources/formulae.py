"""From quantised tensors to numbers: the formula of each layout, in float32.

A layout is that of the library that wrote it; the names are those of its tensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from anymla.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds its k-th column


def scale_numbers(scale: Tensor) -> Tensor:
    """Scales in float32; a byte is an exponent, 2^(byte - 127)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def scaled(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None, zero: Tensor | None = None) -> Tensor:
    """(weight - zero) * scale, with one scale for all, for a row, or for a block of the last two dims.

    Args:
        weight: [..., rows, columns], of any dtype.
        scale: one number, [rows], or [..., a, b]: a grid over rows and columns.
        block: rows and columns of a block; the last ones may be smaller. Default: what divides evenly.
        zero: like ``scale``.
    """
    numbers = weight.float()
    if zero is not None:
        numbers = numbers - _grid(zero.float(), weight, block)
    return numbers * _grid(scale_numbers(scale), weight, block)


def _grid(scale: Tensor, weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    rows, columns = weight.shape[-2:]
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(scale) == rows:
        return scale[:, None]
    if scale.dim() < 2:
        raise CheckpointError(f"scales of shape {list(scale.shape)} do not fit a weight of {list(weight.shape)}")
    for axis, length in ((-2, rows), (-1, columns)):
        count = scale.shape[axis]
        size = -(-length // count) if block is None or count in (1, length) else block[axis]
        if -(-length // size) != count:
            raise CheckpointError(f"scales of shape {list(scale.shape)} do not fit a weight of {list(weight.shape)}")
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return scale


def unpacked(words: Tensor, bits: int, length: int, axis: int) -> Tensor:
    """Unsigned integers of ``bits`` each, one after the other in 32-bit words along ``axis``, as int32."""
    words = words.transpose(axis, -1).long() & 0xFFFFFFFF
    first = torch.arange(length) * bits
    low = words[..., first // 32] >> (first % 32)
    if 32 % bits:  # some lie in two words
        after = words[..., (first // 32 + 1).clamp(max=words.shape[-1] - 1)]
        low = low | after << (32 - first % 32)
    return (low & (1 << bits) - 1).int().transpose(axis, -1)


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, bits: int, plus: int) -> Tensor:
    """GPTQ (AutoGPTQ, GPTQModel): [in bits / 32, out], [groups, out bits / 32], [groups, out]; the weight [out, in].

    ``g_idx`` [in]: the group of each input; ``plus``: what is added to the stored zeros, 1 in the first format.
    """
    inputs, outputs = qweight.shape[0] * 32 // bits, scales.shape[1]
    zeros = unpacked(qzeros, bits, outputs, 1) + plus
    groups = torch.arange(inputs) // -(-inputs // len(scales)) if g_idx is None else g_idx.long()
    return (scales.float()[groups] * (unpacked(qweight, bits, inputs, 0) - zeros[groups])).T


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ's gemm: [in, out / 8], [groups, out / 8], [groups, out], 4 bits; the weight [out, in]."""
    outputs = scales.shape[1]
    order = torch.tensor(AWQ_ORDER).repeat(outputs // 8) + torch.arange(outputs) // 8 * 8
    numbers, zeros = (unpacked(words, 4, outputs, 1)[:, order] for words in (qweight, qzeros))
    size = len(numbers) // len(scales)
    zeros, factors = (part.repeat_interleave(size, dim=0) for part in (zeros, scales.float()))
    return ((numbers - zeros) * factors).T


def packed(words: Tensor, scale: Tensor, shape: Tensor, zero: Tensor | None, g_idx: Tensor | None) -> Tensor:
    """compressed-tensors' pack-quantized: [out, in * bits / 32], [out, groups]; the weight ``shape`` [out, in].

    ``zero`` [out * bits / 32, groups] is packed as well; ``g_idx`` [in]: the group of each input.
    """
    rows, columns = (int(length) for length in shape)
    bits = next((bits for bits in (2, 3, 4, 8) if -(-columns * bits // 32) == words.shape[1]), None)
    if bits is None:
        raise CheckpointError(f"{words.shape[1]} words for {columns} numbers are not packed 2, 3, 4 or 8 bits wide")
    half = 1 << bits - 1
    numbers = (unpacked(words, bits, columns, 1) - half).float()
    zeros = None if zero is None else (unpacked(zero, bits, rows, 0) - half).float()
    if g_idx is None or (g_idx < 0).any():
        return scaled(numbers, scale, zero=zeros)
    groups = g_idx.long()
    return (numbers if zeros is None else numbers - zeros[:, groups]) * scale.float()[:, groups]


def fp4(packed: Tensor) -> Tensor:
    """Two e2m1 numbers in a byte, the lower half first: [..., n] to [..., 2 n]."""
    table = torch.tensor(FP4)
    return torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], dim=-1).flatten(-2)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """gpt-oss: [experts, out, in / 32, 16], [experts, out, in / 32]; the weight [experts, in, out]."""
    return (fp4(blocks) * scale_numbers(scales)[..., None]).flatten(-2).mT


def int8_rows(weight: Tensor, largest: Tensor) -> Tensor:
    """Bitsandbytes' LLM.int8: integers [out, in], and the largest number ``SCB`` [out] of each row, which is 127."""
    return weight.float() * (largest.float() / 127)[:, None]


def four_bit(parts: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Bitsandbytes' nf4 and fp4: bytes of two, the upper half first, that index ``quant_map``; blocks scaled by absmax.

    ``parts``: absmax, quant_map, quant_state (its JSON in bytes); nested_absmax and nested_quant_map where absmax
    is quantised itself.
    """
    state = json.loads(bytes(parts["quant_state"].tolist()))
    largest = parts["absmax"]
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[: len(largest)]
        largest = parts["nested_quant_map"].float()[largest.long()] * outer + state["nested_offset"]
    halves = torch.stack([weight >> 4, weight & 15], dim=-1).flatten().long()
    size = torch.Size(state["shape"]).numel()
    numbers = parts["quant_map"].float()[halves[:size]]
    return (numbers * largest.float().repeat_interleave(state["blocksize"])[:size]).reshape(state["shape"])

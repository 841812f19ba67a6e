"""Tiny checkpoints in the layouts of quantisers, written from their formulae alone, and the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def store(folder: Path, quantise, settings):
    """Quantises the projections in ``folder`` in place; returns the numbers that its tensors then stand for."""
    tensors, stored, meant = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        if name.endswith(tuple(f"{part}.weight" for part in PROJECTIONS)):
            parts, meant[name] = quantise(tensor.float())
            stem = name.removesuffix(".weight")
            stored |= {f"{stem}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return meant


def pack(values, bits, axis):
    """Integers along ``axis`` as one stream of bits in 32-bit words."""
    rows = values.movedim(axis, -1).reshape(-1, values.shape[axis]).tolist()
    words = []
    for row in rows:
        stream = sum(value << bits * number for number, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(stream >> 32 * word) & 0xFFFFFFFF for word in range(count)])
    signed = torch.tensor(words).where(torch.tensor(words) < 2**31, torch.tensor(words) - 2**32).int()
    shape = [length for number, length in enumerate(values.shape) if number != axis % values.dim()]
    return signed.reshape(*shape, -1).movedim(-1, axis)


def fp8_blocks(rows, columns, scale_dtype=torch.float32):
    """DeepSeek's: a scale for each block, of which the last ones may be smaller."""

    def quantise(weight):
        scale = torch.ones(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        meant = torch.empty_like(weight)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                largest = weight[at].abs().max() / 448
                scale[i, j] = largest.log2().ceil().exp2() if scale_dtype == torch.float8_e8m0fnu else largest
                used = scale[i, j].to(scale_dtype).float()
                quantised[at] = (weight[at] / used).to(torch.float8_e4m3fn)
                meant[at] = quantised[at].float() * used
        return {"weight": quantised, "weight_scale_inv": scale.to(scale_dtype)}, meant

    return quantise


def fp8_rows(kind):
    """One scale for all, or one for a row."""

    def quantise(weight):
        largest = weight.abs().max() if kind == "tensor" else weight.abs().amax(1, keepdim=True)
        quantised = (weight / largest * 448).to(torch.float8_e4m3fn)
        scale = largest / 448
        stored = scale.reshape(-1) if kind == "flat rows" else scale
        parts = {"weight": quantised, "weight_scale": stored, "input_scale": torch.ones(())}
        return parts, quantised.float() * scale

    return quantise


def int8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantised = (weight / scale).round().to(torch.int8)
    return {"weight": quantised, "weight_scale": scale.bfloat16()}, quantised.float() * scale.bfloat16().float()


def packed_integers(bits, group, *, zero=False, shuffled=False):
    """compressed-tensors' pack-quantized."""

    def quantise(weight):
        rows, columns = weight.shape
        half, groups = 1 << bits - 1, columns // group
        index = torch.arange(columns) // group
        if shuffled:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
        scale = torch.stack([weight[:, index == g].abs().amax(1) / half for g in range(groups)], 1).bfloat16()
        zeros = torch.randint(-2, 2, (rows, groups), generator=torch.Generator().manual_seed(0)) * zero
        numbers = (weight / scale.float()[:, index]).round().long() + zeros[:, index]
        numbers = numbers.clamp(-half, half - 1)
        parts = {"weight_packed": pack(numbers + half, bits, 1), "weight_scale": scale}
        parts["weight_shape"] = torch.tensor([rows, columns])
        if zero:
            parts["weight_zero_point"] = pack(zeros + half, bits, 0)
        if shuffled:
            parts["weight_g_idx"] = index.int()
        return parts, (numbers - zeros[:, index]).float() * scale.float()[:, index]

    return quantise


def gptq(bits, group, *, plus=1, shuffled=False, indexed=True):
    def quantise(weight):
        rows, columns = weight.shape
        index = torch.arange(columns) // group
        if shuffled:
            index = index.flip(0)
        groups = columns // group
        scale = torch.stack([weight[:, index == g].abs().amax(1) for g in range(groups)]).half() / (1 << bits - 1)
        zeros = torch.randint(1, 1 << bits, (groups, rows), generator=torch.Generator().manual_seed(0))
        numbers = ((weight.T / scale.float()[index]).round().long() + zeros[index]).clamp(0, (1 << bits) - 1)
        parts = {"qweight": pack(numbers, bits, 0), "qzeros": pack(zeros - plus, bits, 1), "scales": scale}
        if indexed:
            parts["g_idx"] = index.int()
        return parts, ((numbers - zeros[index]) * scale.float()[index]).T

    return quantise


def awq(group):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column in each nibble

    def interleaved(values):
        return pack(values.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4, 1)

    def quantise(weight):
        rows, columns = weight.shape
        index = torch.arange(columns) // group
        scale = weight.T.unflatten(0, (-1, group)).abs().amax(1).half() / 7
        zeros = torch.randint(0, 16, (columns // group, rows), generator=torch.Generator().manual_seed(0))
        numbers = ((weight.T / scale.float()[index]).round().long() + zeros[index]).clamp(0, 15)
        parts = {"qweight": interleaved(numbers), "qzeros": interleaved(zeros), "scales": scale}
        return parts, ((numbers - zeros[index]) * scale.float()[index]).T

    return quantise


def nearest_fp4(numbers):
    return (numbers[..., None] - FP4).abs().argmin(-1)


def pairs(codes):
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def nvfp4(owner):
    """Blocks of 16 with FP8 scales; one more scale for all: compressed-tensors divides by it, ModelOpt multiplies."""

    def quantise(weight):
        blocks = weight.unflatten(1, (-1, 16))
        overall = 448 * 6 / weight.abs().max()
        scale = (blocks.abs().amax(2) / 6 * overall).to(torch.float8_e4m3fn)
        used = (scale.float() / overall)[..., None]
        codes = nearest_fp4(blocks / used)
        meant = (FP4[codes] * used).flatten(1)
        if owner == "modelopt":
            last = (1 / overall).reshape(())
            meant = (FP4[codes] * (scale.float() * last)[..., None]).flatten(1)
            return {"weight": pairs(codes.flatten(1)), "weight_scale": scale, "weight_scale_2": last}, meant
        parts = {"weight_packed": pairs(codes.flatten(1)), "weight_scale": scale}
        return parts | {"weight_global_scale": overall.reshape(1)}, meant

    return quantise


def mxfp4(weight):
    """The last dimension in blocks of 32 with scales that are powers of two, as bytes: codes, scales, numbers meant."""
    blocks = weight.unflatten(-1, (-1, 32))
    power = (blocks.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    codes = nearest_fp4(blocks / power.exp2()[..., None])
    return pairs(codes), (power + 127).to(torch.uint8), (FP4[codes] * power.exp2()[..., None]).flatten(-2)


def packed_mxfp4(weight):
    codes, scale, meant = mxfp4(weight)
    return {"weight_packed": codes.flatten(-2), "weight_scale": scale}, meant


def mxfp8(weight):
    blocks = weight.unflatten(1, (-1, 32))
    power = (blocks.abs().amax(2) / 448).log2().ceil()
    codes = (blocks / power.exp2()[..., None]).to(torch.float8_e4m3fn)
    meant = (codes.float() * power.exp2()[..., None]).flatten(1)
    return {"weight": codes.flatten(1), "weight_scale": (power + 127).to(torch.uint8)}, meant

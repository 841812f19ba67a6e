"""Decode on a GPU: the kernel alone, and one step of a whole model, at random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from anymla.modeling import triton_decode
from anymla.modeling.absorbed import absorbed_attention
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.decode_kernel import codes_for_kernel
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import AnymlaLlamaConfig, AnymlaLlamaForCausalLM
from anymla.modeling.spec import KEY, LayerSpec, config_entry
from anymla.modeling.triton_decode import Cached, Tiling, Turns, attend, cdiv

ROPE_DIMS, VLLM_SPLITS = 64, 4
FRESH_BYTES = 1 << 28  # what is read between two runs of a call: no run finds its cache in the L2
Seconds = Callable[[Callable[[], object]], float]


def seconds_on(device: str, repeats: int) -> Seconds:
    """What times a call: the median of ``repeats`` runs, after a first one that compiles; caches are cold."""

    def seconds(call: Callable[[], object]) -> float:
        call()
        if device == "cpu":
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        fresh, times = torch.empty(FRESH_BYTES // 4, dtype=torch.int32, device=device), []
        for _ in range(repeats):
            fresh.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            times.append((begin, end))
        torch.cuda.synchronize()
        found = sorted(begin.elapsed_time(end) / 1e3 for begin, end in times)
        return found[len(found) // 2]

    return seconds


def coded(width: int, bits: int, shape: tuple[int, ...], device: str) -> tuple[Any, Tensor]:
    """A codec of levels at the normal's quantiles, and random rows of bytes."""
    codec = make_codec(Coding(bits=((bits, width),)))
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float32) + 0.5) / 2**bits)
    codec.set_tables({bits: levels.expand(width, -1)})
    rows = torch.randint(0, 256, (*shape, codec.row_bytes), dtype=torch.uint8, device=device)
    return codec.to(device), rows


def held(
    bits: int, batch: int, length: int, rank: int, dtype: torch.dtype, device: str
) -> tuple[list[Any], Any, list[Any]]:
    """A cache of so many bits for the kernel, the angles of rope, and its sides: codec, or None, and rows."""
    if bits == 16:
        rows = [torch.randn(batch, length, width, dtype=dtype, device=device) for width in (rank, ROPE_DIMS)]
        return [Cached(each) for each in rows], None, [(None, each) for each in rows]
    sides = [coded(width, bits, (batch, length), device) for width in (rank, ROPE_DIMS)]
    tile = triton_decode.tile_tokens(rank, dtype)
    places = torch.arange(0, length, tile, device=device), torch.arange(tile, device=device)
    waves = [turn(each) for each in places]
    turns = Turns(*(table.float().contiguous() for each in waves for table in (each.real, each.imag)))
    cached = codes_for_kernel(torch.zeros(batch, 1, 1, rank, dtype=dtype, device=device), *sides)
    if cached is None:
        raise SystemExit(f"the kernel does not read {bits} bits on {device}")
    return cached, turns, sides


def turn(columns: Tensor) -> Tensor:
    """Complex factors [..,K] by which rope turns channels at some columns."""
    pairs = ROPE_DIMS // 2
    theta = 1e4 ** (-torch.arange(pairs, dtype=torch.float64, device=columns.device) / pairs)
    angles = columns[:, None] * theta
    return torch.polar(torch.ones_like(angles), angles)


def kernel_error(bits: int, heads: int, length: int, dtype: torch.dtype, device: str) -> float:
    """The largest error of the kernel against torch in float64, in parts of the largest number."""
    rank = 96
    cached, turns, sides = held(bits, 2, length, rank, dtype, device)
    query, rope = (torch.randn(2, heads, 1, width, device=device).to(dtype) for width in (rank, ROPE_DIMS))
    found, _ = attend(query, rope, *cached, None, 0.1, turns=turns)
    latent, keys = (
        (rows if codec is None else codec.decode(rows, torch.float32)).double()[:, None] for codec, rows in sides
    )
    if turns is not None:
        turned = torch.complex(*keys.chunk(2, -1)) * turn(torch.arange(length, device=device))
        keys = torch.cat([turned.real, turned.imag], -1)
    wanted, _ = absorbed_attention(query.double(), rope.double(), latent, keys, None, 0.1)
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def kernel_row(
    shape: dict[str, int], dtype: torch.dtype, device: str, seconds: Seconds, original: float | None
) -> dict[str, Any]:
    """Seconds of one layer's attention to a latent, by the kernel and by 16 heads at a time; ``original``: SDPA's."""
    batch, length, heads, rank, bits = (shape[name] for name in ("batch", "length", "heads", "rank", "bits"))
    query = torch.randn(batch, heads, 1, rank, dtype=dtype, device=device)
    rope = torch.randn(batch, heads, 1, ROPE_DIMS, device=device).to(dtype)
    cached, turns, sides = held(bits, batch, length, rank, dtype, device)
    row = shape | {"bytes": sum(rows.nbytes for _, rows in sides), "original": original}
    inputs = (query, rope, *cached, None, rank**-0.5)
    row["kernel"] = seconds(lambda: attend(*inputs, turns=turns))
    if bits == 16:  # vLLM's Triton kernel: 16 heads per pass over the cache; its splits, or as many as ours
        tile = triton_decode.tile_tokens(rank, dtype)
        ours = triton_decode.chosen_tiling(query, length).per_split
        theirs = cdiv(cdiv(length, VLLM_SPLITS), tile) * tile
        tilings = [Tiling(16, tile, per_split, warps=4) for per_split in {ours, theirs}]
        row["16 heads per pass"] = min(seconds(lambda t=tiling: attend(*inputs, tiling=t)) for tiling in tilings)
    return row


def original_seconds(shape: dict[str, int], dtype: torch.dtype, device: str, seconds: Seconds) -> tuple[float, int]:
    """Of the original's attention, by the faster of SDPA and of plain products; and its cache's bytes."""
    batch, length, heads, kv_heads, d = (shape[name] for name in ("batch", "length", "heads", "kv_heads", "head_dim"))
    key, value = (torch.randn(batch, kv_heads, length, d, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(batch, heads, 1, d, dtype=dtype, device=device)
    groups = query.view(batch, kv_heads, -1, d)
    calls = (
        lambda: scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads),
        lambda: (groups @ key.mT).softmax(-1) @ value,
    )
    return min(seconds(call) for call in calls), key.nbytes + value.nbytes


def step_rows(sizes: dict[str, int], case: dict[str, int], device: str, seconds: Seconds) -> list[dict[str, Any]]:
    """Seconds of one decode step of a whole model: the original, and latents of 16, 8 and 4 bits."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    ids = torch.zeros(case["batch"], 1, dtype=torch.long, device=device)
    rows = []
    for bits in (None, 16, 8, 4):
        model = made(sizes, case["rank"], bits, dtype, device)
        cache = filled_cache(model, case["length"], ids)

        def step(model: Any = model, cache: Any = cache) -> None:  # the cache grows, as in decode
            model(input_ids=ids, past_key_values=cache)

        rows.append(case | {"bits": bits or "original", "seconds": seconds(step)})
        del model, cache
    return rows


def made(sizes: dict[str, int], rank: int, bits: int | None, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights; ``bits`` of its latent, None: the original."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if bits is None:
            model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = AnymlaLlamaForCausalLM(converted_config(sizes, rank, bits))
    torch.set_default_dtype(torch.float32)
    for part in model.modules():
        if hasattr(part, "key_codec"):
            for codec in (part.key_codec, part.value_codec):
                levels = torch.linspace(-2, 2, 2**bits, device=device)
                codec.set_tables({bits: levels.expand(codec.width, -1)})
    return model.eval()


def converted_config(sizes: dict[str, int], rank: int, bits: int) -> Any:
    """The config of a model whose latents hold ``bits`` bits per number."""
    heads, kv_heads, d = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    attention = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=d, rope_pairs=d // 2, scaling=d**-0.5)
    ropes = min(ROPE_DIMS, d)
    codings = [Coding(bits=((bits, width),)) for width in (rank, ropes)]
    coded = CodedSpec(keys=codings[0], values=codings[1], key_basis="own", value_basis="own")
    latent = LatentSpec(kv_lora_rank=rank, qk_rope_head_dim=ropes, biases=False)
    layers = tuple(
        LayerSpec(
            module=f"model.layers.{index}.self_attn",
            attention=attention,
            latent=latent,
            coded=None if bits == 16 else coded,
        )
        for index in range(sizes["num_hidden_layers"])
    )
    return AnymlaLlamaConfig(**sizes, **{KEY: config_entry(layers)}, qk_head_dim=d + ropes)


def filled_cache(model: Any, length: int, ids: Tensor) -> DynamicCache:
    """A cache of random tokens in the model's own layout."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            like = getattr(layer, name)
            shape = (*like.shape[:2], length, like.shape[-1])
            if like.dtype == torch.uint8:
                filled = torch.randint(0, 256, shape, dtype=like.dtype, device=like.device)
            else:
                filled = torch.randn(shape, dtype=like.dtype, device=like.device)
            setattr(layer, name, filled)
    return cache

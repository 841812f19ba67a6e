"""The decode kernel equals torch in float64, over shapes, masks and codes; so do whole models that use it.

Without a GPU it runs in Triton's interpreter, which shows that it computes the right thing, and nothing about speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import anymla
from anymla.modeling import absorbed, decode_kernel, modeling_anymla
from anymla.modeling.absorbed import absorbed_attention
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import Coding
from anymla.modeling.decode_kernel import codes_for_kernel, uses_kernel
from anymla.register import modelling_files
from tests.coded_models import coded_latent
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_model

pytest.importorskip("triton", reason="the decode kernel needs triton: pip install anymla[gpu]")
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
TEXT = {"calibration_tokens": 512, "calibration_length": 32}


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, which is used on the CPU as well."""
    monkeypatch.setattr(decode_kernel, "INTERPRETED", True)
    from anymla.modeling import triton_decode

    return triton_decode


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(dtype, batch, heads, new, length, rank, ropes):
    shapes = [(batch, *rows, width) for rows in ((heads, new), (1, length)) for width in (rank, ropes)]
    return [random(*shape, seed=index).to(dtype).to(DEVICE) for index, shape in enumerate(shapes)]


def masks(kind, dtype, batch, heads, new, length):
    """Left padding of the second sequence, a window, or a bias per head; each causal."""
    allowed = torch.ones(batch, 1, new, length, dtype=torch.bool).tril(length - new)
    if kind == "padded":
        allowed[-1, :, :, : length // 3] = False
    if kind in ("window", "additive"):
        allowed &= torch.ones(new, length, dtype=torch.bool).triu(length - new - 20)
    if kind == "additive":
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min).to(DEVICE)
    if kind == "per head":
        slopes = torch.linspace(0.01, 0.3, heads)[None, :, None, None]
        return (torch.arange(-length, 0) * slopes + torch.zeros(1, 1, new, 1)).to(dtype).to(DEVICE)
    return None if kind == "none" else allowed.to(DEVICE)


def exact(tensor):
    return tensor if tensor is None or tensor.dtype == torch.bool else tensor.cpu().double()


def expected(query, rope, latent, keys, mask, scale, **options):
    """By torch in float64, where the kernel is never used."""
    sinks = exact(options.pop("sinks", None))
    mask = None if mask is None else exact(mask.cpu())
    tensors = (exact(tensor) for tensor in (query, rope, latent, keys))
    return absorbed_attention(*tensors, mask, scale, sinks=sinks, summed=True, **options)


def distance(found, wanted):
    return max((a.cpu().double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


SHAPES = [  # batch, heads, new, length, rank, ropes
    ((2, 1, 1, 1, 16, 2), "none"),
    ((1, 4, 1, 37, 24, 6), "per head"),
    ((2, 5, 3, 70, 33, 0), "padded"),
    ((1, 16, 1, 129, 64, 32), "window"),
    ((2, 70, 1, 35, 100, 10), "padded"),
    ((1, 128, 1, 17, 512, 64), "none"),
    ((2, 3, 2, 50, 7, 7), "additive"),
]


@pytest.mark.parametrize(
    ("shape", "mask", "dtype"),
    [(*each, dtype) for dtype in TOLERANCE for each in (SHAPES if dtype != torch.float16 else SHAPES[1:4])],
)
def test_numbers(shape, mask, dtype, kernel, monkeypatch):
    batch, heads, new, length, *_ = shape
    monkeypatch.setattr(kernel, "PROGRAMS_PER_CORE", 2 if length % 2 else 1)
    tensors = inputs(dtype, *shape)
    mask = masks(mask, dtype, batch, heads, new, length)
    options = {"sinks": random(heads).to(DEVICE), "softcap": 3.0} if length % 2 else {}
    scale = 0.7 * shape[-2] ** -0.5
    with_kernel = absorbed_attention(*tensors, mask, scale, **options)
    assert distance(with_kernel, expected(*tensors, mask, scale, **options)) < TOLERANCE[dtype]


@pytest.mark.parametrize("per_split", [16, 48, 304])
def test_splits_are_merged(per_split, kernel):
    query, rope, latent, keys = inputs(torch.float32, 1, 3, 1, 301, 20, 4)
    tiling = kernel.Tiling(rows=16, tokens=16, per_split=per_split, warps=4)
    held = (kernel.Cached(latent[:, 0]), kernel.Cached(keys[:, 0]))
    found = kernel.attend(query, rope, *held, None, 1.0, tiling=tiling)
    assert distance(found, expected(query, rope, latent, keys, None, 1.0)) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [24, 128, 256, 512])
def test_tiles_fit_into_the_shared_memory(rank, dtype, kernel):
    """Of an H100, an A100 and a consumer GPU."""
    found = [kernel.most_rows(rank, dtype, size << 10) for size in (227, 163, 99)]
    held = 2 * kernel.tile_tokens(rank, dtype) * max(32, rank) * dtype.itemsize  # two tiles of the cache
    assert all(16 <= rows <= 128 for rows in found) and found == sorted(found, reverse=True)
    for rows, size in zip(found, (227, 163, 99)):
        assert held + rows * rank * dtype.itemsize <= size << 10
    assert dtype == torch.float32 or found[1] == min(128, kernel.ONE_TILE // rank)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_torch_computes_on_gpus_with_little_shared_memory(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decode_kernel._new_enough.cache_clear()
    try:
        assert decode_kernel._new_enough(torch.device("cuda")) is runs
    finally:
        decode_kernel._new_enough.cache_clear()


def test_a_row_that_sees_nothing_stays_finite(kernel):
    tensors, mask = inputs(torch.float32, 2, 2, 1, 40, 20, 4), torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    found = absorbed_attention(*tensors, mask, 1.0)
    assert all(part.isfinite().all() for part in found)
    assert distance([found[0]], expected(*tensors, mask, 1.0)[:1]) < 3e-6


def test_nothing_beyond_the_cache_is_read(kernel):
    """A static cache has room after its tokens, and rows of another width may lie between them."""
    query, rope, latent, keys = inputs(torch.float32, 2, 3, 1, 45, 20, 6)
    held = [torch.full((2, 1, 64, part.shape[-1] + 3), torch.nan, device=DEVICE) for part in (latent, keys)]
    slices = []
    for room, part in zip(held, (latent, keys)):
        slices.append(room[:, :, 2:47, 1:-2])
        slices[-1].copy_(part)
    found = absorbed_attention(query, rope, *slices, None, 1.0)
    assert distance(found, expected(query, rope, latent, keys, None, 1.0)) < 3e-6


MIXED = ((16, 2), (6, 3), (3, 5), (4, 3), (0, 2), (5, 4), (2, 3), (1, 3), (8, 1), (4, 2), (16, 1))
CODINGS = {  # of a latent, of a rope key
    "8 bits": ({"bits": ((8, 35),)}, {"bits": ((8, 6),)}),
    "4 bits": ({"bits": ((4, 33),)}, {"bits": ((4, 8),)}),
    "3 bits": ({"bits": ((3, 20),)}, {"bits": ((3, 6),)}),
    "mixed": ({"bits": MIXED}, {"bits": ((5, 2), (0, 1), (3, 1))}),
    "no bits": ({"bits": ((4, 33),)}, {"bits": ((0, 8),)}),
    "outliers": ({"bits": ((4, 33),), "outliers": 2}, {"bits": ((3, 8),), "outliers": 1}),
    "per token": ({"bits": ((4, 33),), "outliers": 3, "token_scale": True}, {"bits": ((3, 8),), "token_scale": True}),
    "int 4": ({"bits": ((4, 33),), "kind": "int", "block": 8}, {"bits": ((4, 7),), "kind": "int"}),
    "int 8": ({"bits": ((8, 33),), "kind": "int", "block": 16}, {"bits": ((16, 6),), "kind": "plain"}),
    "fp8": ({"bits": ((8, 33),), "kind": "fp8"}, {"bits": ((8, 6),), "kind": "fp8", "block": 4}),
}


def filled(coding, seed):
    codec = make_codec(Coding(**coding))
    counts = codec.coding.counts.items() if codec.coding.kind == "table" else ()
    sizes = {bits: (n, 2**bits) for bits, n in counts if 0 < bits < 16}
    codec.set_tables({bits: random(*size, seed=seed).sort(-1).values for bits, size in sizes.items()})
    return codec.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codings", CODINGS)
def test_codes_are_read_and_turned(codings, dtype, kernel):
    latent_codec, rope_codec = (filled(coding, seed) for seed, coding in enumerate(CODINGS[codings]))
    rank, ropes, length, pairs = latent_codec.width, rope_codec.width, 75, -(-rope_codec.width // 2)
    query, rope, latent, keys = inputs(dtype, 2, 3, 1, length, rank, ropes)
    rows = latent_codec.encode(latent[:, 0]), rope_codec.encode(keys[:, 0])
    theta, tile = torch.linspace(0.01, 2, pairs, dtype=torch.float64), kernel.tile_tokens(rank, dtype)
    angles = [place[:, None] * theta for place in (torch.arange(0, length, tile), torch.arange(tile))]
    tables = [table.float().to(DEVICE) for each in angles for table in (each.cos(), each.sin())]
    left_out = torch.tensor([[0, 1, -1], [4, 5, 6]], device=DEVICE)
    cached = codes_for_kernel(query, (latent_codec, rows[0]), (rope_codec, rows[1]))
    found = kernel.attend(query, rope, *cached, None, 0.3, turns=kernel.Turns(*tables), left_out=left_out)
    latent, keys = latent_codec.decode(rows[0], dtype).cpu(), rope_codec.decode(rows[1], torch.float64).cpu()
    if ropes % 2:  # the last imaginary part is missing
        keys = torch.cat([keys, keys.new_zeros(2, length, 1)], -1)
        rope = torch.cat([rope, rope.new_zeros(2, 3, 1, 1)], -1)
    wave = torch.polar(torch.ones(length, pairs, dtype=torch.float64), torch.arange(length)[:, None] * theta)
    turned = torch.complex(*keys.chunk(2, -1)) * wave
    keys = torch.cat([turned.real, turned.imag], -1)
    seen = torch.ones(2, 1, 1, length, dtype=torch.bool)
    seen[0, ..., :2], seen[1, ..., 4:7] = False, False
    wanted = expected(query, rope, latent[:, None], keys[:, None], seen, 0.3)
    assert distance(found, wanted) < TOLERANCE[dtype]


def test_torch_does_what_the_kernel_does_not(kernel):
    query, _, latent, keys = inputs(torch.float32, 1, 2, 1, 9, 8, 4)
    assert uses_kernel(query, latent, keys)
    with torch.no_grad():
        assert uses_kernel(query.clone().requires_grad_(), latent, keys)
    assert not uses_kernel(query.clone().requires_grad_(), latent, keys)
    assert not uses_kernel(query.double(), latent, keys)
    assert not uses_kernel(query.expand(1, 2, 17, 8), latent, keys)
    assert not uses_kernel(query, latent[:, :, :0], keys[:, :, :0])
    assert not uses_kernel(query, latent.transpose(2, 3), keys)
    many = filled({"bits": ((4, 64),), "outliers": 17}, 0)
    assert codes_for_kernel(query, (many, many.encode(random(1, 9, 64)))) is None


def test_a_cpu_keeps_torchs_way():
    assert not uses_kernel(*inputs(torch.float32, 1, 2, 1, 9, 8, 4)[::2]) or DEVICE == "cuda"


def converted(family, folder, method="mla", **settings):
    """A tiny model with a latent of half its cache."""
    made = make_model(family, torch.float32) if family == "llama" else tiny_model(family, torch.float32)
    source = save_model(made, folder / "source")
    steps = [{method: {"kv_cache": 0.5, "reconstruction_steps": 0, **TEXT, **settings}}]
    anymla.run(source, folder / "out", steps=steps)
    return AutoModelForCausalLM.from_pretrained(folder / "out", experts_implementation="eager").eval()


def generated(model, cache=None):
    """Tokens and their logits after a batch of prompts, padded on the left."""
    ids, mask = token_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :7] = 0
    model = model.to(DEVICE)
    made = model.generate(
        ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=5, min_new_tokens=5, do_sample=False,
        return_dict_in_generate=True, output_logits=True, past_key_values=cache,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


def counted(monkeypatch, kernel):
    """The forms of latents that the kernel reads from now on."""
    calls, attend = [], kernel.attend

    def noted(*args, **options):
        calls.append(args[2].form)
        return attend(*args, **options)

    monkeypatch.setattr(kernel, "attend", noted)
    return calls


MODELS = {  # plain latents, soft-caps and windows, sinks, exact window, codes
    "llama": lambda folder: converted("llama", folder),
    "gemma2": lambda folder: converted("gemma2", folder),
    "gpt_oss": lambda folder: converted("gpt_oss", folder),
    "mfa": lambda folder: converted("llama", folder, "mfa", key_reuse=True),
    "exact window": lambda folder: converted("llama", folder, exact_window=6),
    "4 bits": lambda folder: coded_latent(make_model("llama", torch.float32), folder, bits=4),
    "3 bits, gemma2": lambda folder: coded_latent(tiny_model("gemma2", torch.float32), folder, bits=3),
    "int 8": lambda folder: coded_latent(make_model("llama", torch.float32), folder, codec="int", bits=8, block=8),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_generate_the_same(name, kernel, tmp_path, monkeypatch):
    model = MODELS[name](tmp_path)
    calls = counted(monkeypatch, kernel)
    tokens, logits = generated(model)
    assert len(calls) >= 4 * 2 and any(form.coded for form in calls) == ("bits" in name or "int" in name)
    monkeypatch.setattr(decode_kernel, "uses_kernel", lambda *_: False)
    monkeypatch.setattr(absorbed, "uses_kernel", lambda *_: False)
    done = len(calls)
    by_torch, wanted = generated(model)
    assert len(calls) == done
    assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max() and torch.equal(tokens, by_torch)


def test_a_static_cache(kernel, tmp_path, monkeypatch):
    model = converted("llama", tmp_path)
    calls = counted(monkeypatch, kernel)
    tokens, logits = generated(model, StaticCache(config=model.config, max_cache_len=40))
    assert calls
    monkeypatch.setattr(absorbed, "uses_kernel", lambda *_: False)
    by_torch, wanted = generated(model)
    assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max() and torch.equal(tokens, by_torch)


def test_the_kernel_travels_with_checkpoints():
    files = {file.name for file in modelling_files(modeling_anymla)}
    assert {"decode_kernel.py", "code_layout.py", "triton_decode.py", "triton_kernels.py"} <= files


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here():
    """Types and shared memory, which the interpreter does not check."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiled_kernel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(shared) == 4 and max(shared) <= 227 << 10  # of a Hopper GPU

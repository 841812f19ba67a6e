"""What a GPU does with a latent cache: correctness, decode, conversion. One call, under nine minutes.

    python benchmarks/gpu.py                 on the first CUDA device
    python benchmarks/gpu.py --interpret     the same at small sizes on the CPU: its times say nothing
    python benchmarks/gpu.py --json FILE     also writes all rows

All models and caches are random. "original" is the faster of scaled_dot_product_attention and plain products, with the
keys and values of the model. "16 heads per pass" re-creates the algorithm of vLLM's Triton kernel for MLA: each program
has 16 heads, so the cache is read once per 16 heads. It has vLLM's four splits or as many as ours, whichever is faster.

"of copy rate" is the bytes of the cache over the time, in parts of the bytes per second that a copy reads and writes.
Every run finds cold caches. What does not fit into time or memory is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded

import torch
from gpu_decode import ROPE_DIMS, Seconds, kernel_error, kernel_row, original_seconds, seconds_on, step_rows
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import anymla
from anymla.demo import bundled_model
from anymla.modeling import decode_kernel
from anymla.report.tables import table

LIMIT = 520.0  # seconds
RESERVED = 200.0  # of these, for steps and conversions
SIZES = {  # Llama-shaped: 1B, 8B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64, "layers": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128, "layers": 32},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "layers": 4}


class Run:
    """Rows of all parts, and the time that is left."""

    def __init__(self, interpret: bool) -> None:
        self.interpret, self.begun, self.results = interpret, time.monotonic(), dict[str, Any]()
        self.device, self.dtype = ("cpu", torch.float32) if interpret else ("cuda", torch.bfloat16)
        self.seconds: Seconds = seconds_on(self.device, repeats=7)
        self.console, self.left_out = Console(width=160, highlight=False), list[str]()

    def fits(self, what: str, expected: float, size: int = 0) -> bool:
        """Whether ``expected`` seconds and ``size`` bytes are left; else ``what`` is left out."""
        if not self.interpret:
            torch.cuda.empty_cache()
        late = not self.interpret and time.monotonic() - self.begun + expected > LIMIT
        large = not self.interpret and size > 0.7 * torch.cuda.mem_get_info()[0]
        if late or large:
            self.left_out.append(f"{what}: {'no time' if late else 'no memory'}")
        return not (late or large)

    def print(self, title: str, columns: tuple[str, ...], lines: list[tuple[Any, ...]]) -> None:
        self.console.print(table(title, columns, lines))


def rates(run: Run) -> None:
    """Bytes per second of a copy, and operations per second of a matrix product."""
    count, size = (1 << 16, 64) if run.interpret else (1 << 29, 8192)
    source = torch.ones(count, dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    matrix = torch.randn(size, size, dtype=run.dtype, device=run.device)
    copied = 2 * source.nbytes / run.seconds(lambda: target.copy_(source))
    products = 2 * size**3 / run.seconds(lambda: matrix @ matrix)
    run.results["rates"] = {"copy_bytes_per_second": copied, "matmul_operations_per_second": products}
    run.print("Rates", ("copy GB/s", "matmul TFLOP/s"), [(f"{copied / 1e9:.0f}", f"{products / 1e12:.1f}")])


def correctness(run: Run, folder: Path) -> None:
    """The kernel against torch in float64; a conversion and its tokens against those of the CPU."""
    length = 70 if run.interpret else 3001
    rows = [
        {"bits": bits, "heads": heads, "relative_error": kernel_error(bits, heads, length, run.dtype, run.device)}
        for bits in (16, 8, 4, 3)
        for heads in ((5,) if run.interpret else (5, 24, 128))
    ]
    lines = [(row["bits"], row["heads"], f"{row['relative_error']:.1e}") for row in rows]
    run.print("Kernel against float64", ("bits", "heads", "relative error"), lines)
    checkpoint(folder / "tiny", TINY, 2)
    models = []
    for device in ("cpu", run.device):
        converted(folder / "tiny", folder / "tiny-out", device, 512, reconstruction_steps=0)
        models.append(AutoModelForCausalLM.from_pretrained(folder / "tiny-out").eval().to(device))
    ids, options = torch.arange(3, 43)[None], {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        logits = [model(input_ids=ids.to(model.device)).logits.cpu() for model in models]
        tokens = [model.generate(ids.to(model.device), **options).cpu() for model in models]
    by_cpu, by_device = logits
    found = {
        "logits_relative_difference": float((by_cpu - by_device).abs().max() / by_cpu.abs().max()),
        "tokens_equal": bool(torch.equal(*tokens)),
    }
    run.results["correctness"] = {"kernel": rows, "conversion": found}
    lines = [(f"{found['logits_relative_difference']:.1e}", found["tokens_equal"])]
    run.print(f"Conversion on {run.device} against the CPU", ("logits' relative difference", "same tokens"), lines)


def checkpoint(folder: Path, sizes: dict[str, int], layers: int, dtype: torch.dtype = torch.float32) -> None:
    """A random checkpoint with the bundled tokenizer."""
    config = LlamaConfig(**model_sizes(sizes, layers), vocab_size=512, dtype=dtype)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, folder / name)


def model_sizes(sizes: dict[str, int], layers: int) -> dict[str, int]:
    """Fields of a Llama's config."""
    own = {name: value for name, value in sizes.items() if name != "layers"}
    heads = {"num_key_value_heads": max(2, sizes["num_attention_heads"] // 4), "num_hidden_layers": layers}
    return own | heads | {"max_position_embeddings": 1 << 18}


def converted(source: Path, output: Path, device: str, tokens: int, **settings: Any) -> float:
    """Seconds of a conversion to a latent of a quarter of the cache."""
    shutil.rmtree(output, ignore_errors=True)
    begun = time.monotonic()
    settings |= {"kv_cache": 0.25, "device": device, "calibration_tokens": tokens, "calibration_length": 256}
    anymla.run(source, output, steps=[{"mla": settings}])
    return time.monotonic() - begun


def decode(run: Run) -> None:
    """One layer's attention over shapes."""
    base = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    batches, lengths, ranks = ((1, 8, 64), (4096, 32768, 131072), (64, 128, 256, 512))
    originals = [(32, 8), (128, 8)]
    if run.interpret:
        batches, lengths, ranks, originals = (2,), (100,), (64,), [(32, 8)]
    rows = []
    for heads, kv_heads in originals:
        for length in lengths:
            for batch in batches:
                case = base | {"heads": heads, "kv_heads": kv_heads, "batch": batch, "length": length}
                size = batch * length * kv_heads * 128 * 2 * run.dtype.itemsize
                name, original = f"attention of {heads} heads, {batch} x {length}", None
                if run.fits(f"{name}, original", RESERVED, size):
                    original, _ = original_seconds(case, run.dtype, run.device, run.seconds)
                for rank in ranks:
                    for bits in (16, 8, 4):
                        held_size = batch * length * (rank + ROPE_DIMS) * run.dtype.itemsize
                        if run.fits(f"{name}, r {rank}, {bits} bits", RESERVED, held_size):
                            shape = case | {"rank": rank, "bits": bits}
                            rows.append(kernel_row(shape, run.dtype, run.device, run.seconds, original))
    run.results["attention"] = rows
    copied = run.results["rates"]["copy_bytes_per_second"]
    run.print(
        "Attention of one layer, one new token",
        ("heads", "batch", "tokens", "r", "bits", "original us", "16 heads us", "kernel us", "of copy rate"),
        [attention_line(row, copied) for row in rows],
    )


def attention_line(row: dict[str, Any], copied: float) -> tuple[Any, ...]:
    """One line of the table of attention."""
    times = (row["original"], row.get("16 heads per pass"), row["kernel"])
    shown = ("-" if each is None else f"{each * 1e6:.0f}" for each in times)
    names = ("heads", "batch", "length", "rank", "bits")
    return (*(row[name] for name in names), *shown, f"{row['bytes'] / row['kernel'] / copied:.1%}")


def steps(run: Run) -> None:
    """One step of a whole model."""
    sizes = TINY | {"head_dim": 64} if run.interpret else SIZES["1B"]
    cases = [(1, 100, 64)] if run.interpret else [(1, 32768, 256), (16, 32768, 256), (1, 131072, 256)]
    rows = []
    layers = 2 if run.interpret else sizes["layers"]
    for batch, length, rank in cases:
        case = {"batch": batch, "length": length, "rank": rank}
        if run.fits(f"step of {batch} x {length}", 40, batch * length * layers * 4096):
            model = model_sizes(sizes, layers) | {"vocab_size": 512 if run.interpret else 128256}
            rows += step_rows(model, case, run.device, run.seconds)
    run.results["steps"] = rows
    lines = [(row["batch"], row["length"], row["rank"], row["bits"], f"{row['seconds'] * 1e3:.2f}") for row in rows]
    run.print("One decode step of a whole model, stock DynamicCache", ("batch", "tokens", "r", "bits", "ms"), lines)


def conversion(run: Run, folder: Path) -> None:
    """Seconds of a conversion: measured with one and with two layers, extrapolated to all."""
    rows = []
    for name, sizes in ({"tiny": TINY} if run.interpret else SIZES).items():
        if not run.fits(f"conversion of {name}", 90 if name == "8B" else 40):
            continue
        found = []
        if not run.interpret:
            torch.cuda.reset_peak_memory_stats()
        for layers in (1, 2):
            checkpoint(folder / name, sizes, layers, run.dtype)
            few: dict[str, Any] = {"reconstruction_steps": 2} if run.interpret else {}
            tokens = 512 if run.interpret else 65536
            found.append(converted(folder / name, folder / f"{name}-out", run.device, tokens, **few))
        per_layer = found[1] - found[0]
        whole = found[0] + (sizes["layers"] - 1) * per_layer
        peak = 0 if run.interpret else torch.cuda.max_memory_allocated()
        rows.append({"model": name, "per_layer": per_layer, "extrapolated": whole, "peak_bytes": peak})
    run.results["conversion"] = rows
    run.print(
        "Conversion, extrapolated from one and two layers; the vocabulary is small",
        ("model", "s per layer", "s for all layers", "peak GB"),
        [
            (row["model"], f"{row['per_layer']:.1f}", f"{row['extrapolated']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}")
            for row in rows
        ],
    )


@torch.inference_mode()
def timed(run: Run) -> None:
    decode(run)
    steps(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="small sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args()
    if not (options.interpret or torch.cuda.is_available()):
        parser.error("no CUDA device is here; --interpret runs small sizes on the CPU")
    decode_kernel.INTERPRETED = options.interpret
    run = Run(options.interpret)
    run.results["machine"] = "CPU, interpreted" if options.interpret else torch.cuda.get_device_name()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rates(run)
        correctness(run, Path(folder))
        timed(run)
        conversion(run, Path(folder))
    run.results |= {"left_out": run.left_out, "seconds": time.monotonic() - run.begun}
    run.console.print(*(f"left out: {each}" for each in run.left_out), sep="\n", style="dim")
    if options.json:
        options.json.write_text(json.dumps(run.results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

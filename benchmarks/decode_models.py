"""One decode step of real models, and a prefill: an original beside its conversions, and the bytes of their caches.

    anymla convert SmolLM2-135M-Instruct -o codes --kv-cache 0.125
    anymla convert SmolLM2-135M-Instruct -o latent --kv-cache 0.125 --codec none --reconstruction-steps 0
    python benchmarks/decode_models.py SmolLM2-135M-Instruct codes latent

The first model is a checkpoint folder, or one that comes as a package. "original" is the faster of PyTorch's fused
attention and plain matrix products. Caches hold random numbers: speed does not depend on them, nor on how good a
conversion is. Lengths beyond a model's context are as slow as they would be.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command import folder_of
from decode import DTYPES, plain_interface, step_row
from machine import fastest_of
from rich.console import Console
from transformers import AttentionInterface, DynamicCache

from anymla.io.checkpoint import load_model
from anymla.report.tables import table
from anymla.report.units import size

ORIGINALS = ("sdpa", "plain")


def load(original: Path, conversions: list[Path], dtype: str) -> dict[str, Any]:
    """The models by the names of their rows: the original with both attentions, then its conversions."""
    AttentionInterface.register("plain", plain_interface)
    models = {name: load_model(original, dtype=dtype) for name in ORIGINALS}
    models["plain"].set_attn_implementation("plain")
    return models | {folder.name: load_model(folder, dtype=dtype) for folder in conversions}


def prefill_table(models: dict[str, Any], length: int, console: Console) -> None:
    """Measures and prints a prompt of ``length`` tokens in one forward pass."""
    ids = torch.randint(3, 1000, (1, length))

    def prompt(model: Any) -> None:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config))

    steps = {name: partial(prompt, model) for name, model in models.items()}
    times = fastest_of(steps, seconds=10, at_least=3)
    best = min(times[name] for name in ORIGINALS)
    lines = [(name, length, f"{each:.2f}", f"{each / best:.2f}") for name, each in times.items()]
    console.print(table("Prefill", ("model", "tokens", "s", "this/original"), lines))


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("conversions", type=Path, nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="also time a prompt so long")
    given = parser.parse_args()
    models, lines = load(folder_of(given.original), given.conversions, given.dtype), []
    console = Console(width=160, highlight=False)
    for length in given.lengths:
        row = step_row(models, length, given.batch)
        best, whole = min(row[name] for name in ORIGINALS), row["cache_bytes"]["sdpa"]
        for name in models:
            part = row["cache_bytes"][name]
            times = (f"{row[name] * 1e3:.1f}", f"{row[name] / best:.2f}")
            lines.append((name, length, given.batch, *times, f"{size(part)} ({part / whole:.1%})"))
        console.print(f"measured {length} tokens", style="dim")
    columns = ("model", "tokens", "batch", "ms", "this/original", "live cache")
    if given.prefill:
        prefill_table(models, given.prefill, console)
    console.print(table(f"One decode step in {given.dtype}", columns, lines))


if __name__ == "__main__":
    main()

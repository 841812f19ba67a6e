"""Seconds and peak memory of a conversion against model size and calibration tokens, each in a process of its own.

    python benchmarks/convert.py             about ten minutes on two cores

Models are random and Llama-shaped, float32. Printed beside each: the weights' bytes, one layer's statistics, and what a
process that only imports torch and transformers takes; the peak should stay below their sum plus the activations of one
layer, and time should grow linearly in layers and in tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from anymla.demo import bundled_model
from anymla.pipeline import explain_plan, plan
from anymla.report.tables import table
from anymla.report.units import size

BASELINE = """
import resource, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import anymla.sweep.run
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1024, 16, 16, 64


def make_checkpoint(folder: Path, layers: int) -> int:
    """A random checkpoint with the bundled tokenizer; returns the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, folder / name)
    return (folder / "model.safetensors").stat().st_size


def measure(folder: Path, tokens: int) -> dict[str, Any]:
    """Converts in a fresh process and reads its report."""
    command = [str(Path(sys.executable).parent / "anymla"), "convert", str(folder), "-o", str(folder.parent / "out")]
    command += ["--overwrite", "--json", "--kv-cache", "0.25", "--calibration-tokens", str(tokens)]
    command += ["--calibration-length", "512"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def row(folder: Path, layers: int, tokens: int, weights: int, baseline: int) -> tuple[Any, ...]:
    """One line of the table."""
    report = measure(folder, tokens)
    predicted = explain_plan(plan(folder, kv_cache=0.25, calibration_tokens=tokens))["predicted_peak_bytes"]
    numbers = 2 * KV_HEADS * HEAD_DIM
    statistics = 8 * (2 * numbers**2 + HEADS * HEAD_DIM**2)  # the moments; the algebra takes a few more of this size
    activations = tokens * HIDDEN * 4  # hidden states of all windows, once
    peak = report["peak_rss_bytes"]
    rest = peak - baseline - weights
    return (
        layers,
        tokens,
        f"{report['seconds']:.0f}",
        f"{report['seconds'] / layers / tokens * 1e6:.0f}",
        *(size(value) for value in (weights, statistics, activations, baseline, peak, rest, predicted)),
        f"{peak / predicted:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    options = parser.parse_args()
    console, lines = Console(width=170, highlight=False), []
    baseline = int(subprocess.run([sys.executable, "-c", BASELINE], check=True, capture_output=True, text=True).stdout)
    cases = [(layers, options.tokens[0]) for layers in options.layers]
    cases += [(options.layers[0], tokens) for tokens in options.tokens[1:]]
    for layers, tokens in cases:
        with tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            weights = make_checkpoint(Path(scratch) / "model", layers)
            lines.append(row(Path(scratch) / "model", layers, tokens, weights, baseline))
            console.print(f"measured {layers} layers, {tokens} tokens", style="dim")
    columns = ("layers", "tokens", "seconds", "us/layer/token", "weights", "moments", "activations", "imports", "peak")
    console.print(
        table("Conversion at 25 %", (*columns, "peak - weights - imports", "predicted", "peak/predicted"), lines)
    )


if __name__ == "__main__":
    main()

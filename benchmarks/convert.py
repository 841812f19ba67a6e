"""Seconds and peak memory of a conversion against model size and calibration tokens, each in a process of its own.

    python benchmarks/convert.py             about ten minutes on two cores
    python benchmarks/convert.py --real      what each effort costs and gives on SmolLM2-135M-Instruct, and TransMLA

With ``--real``, codes, latents of 16-bit numbers and TransMLA have one share of the bytes. CPU seconds are those of all
cores together. KL and perplexity are those of text that no calibration saw. ``--first N`` takes the model's first N
layers alone: its KL is then no quality, but rows compare. ``--text`` and ``--held-out`` replace the bundled stories,
``--only`` and ``--efforts`` choose the rows, ``--set name=value`` adds a setting to all.

Else models are random and Llama-shaped, float32. Printed beside each: the weights' bytes, one layer's statistics, and
what a process that only imports torch and transformers takes; the peak should stay below their sum plus the
activations of one layer, and time should grow linearly in layers and in tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.io.real_models import real_model
from anymla.methods.effort import EFFORTS
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
SHARE = 0.25  # of the bytes
SYSTEMS = {
    "codes": [],
    "latents": ["--codec", "none"],
    "TransMLA": [  # its best settings on SmolLM2 at this share, docs/fidelity.md
        *("--codec", "none", "--rope", "freqfold-4", "--rope-dims", "32", "--factorization", "balanced-pca"),
        *("--no-expected-rotation", "--reconstruction-steps", "0"),
    ],
}


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
    command += ["--overwrite", "--json", "--codec", "none", "--kv-cache", "0.25", "--calibration-tokens", str(tokens)]
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


def first_layers(model: Path, layers: int, folder: Path) -> Path:
    """The model with its first ``layers`` alone, in ``folder``."""
    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def real_row(model: Path, system: str, effort: str, options: argparse.Namespace) -> tuple[Any, ...]:
    """One line of the table of a real model: what the conversion took, and what it lost."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "anymla", "convert", str(model), "-o", str(out), "--json", *SYSTEMS[system]]
        command += ["--kv-cache", str(SHARE), "--effort", effort, "--calibration", str(options.text)]
        for name, _, value in (each.partition("=") for each in options.set):
            command += [f"--{name.replace('_', '-')}", value]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        scores = anymla.evaluate(out, options.held_out, model, tokens=options.eval_tokens)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    recipe = report["recipe"].get("transform_coding", report["recipe"])
    steps = recipe.get("reconstruction_steps", "-")
    spent = (recipe["calibration_tokens"], "by size" if steps is None else steps)
    taken = (f"{cpu:.0f}", f"{cpu / len(report['layers']):.1f}", f"{report['seconds']:.0f}")
    quality = (f"{scores.kl:.4f}", f"{scores.perplexity:.2f}")
    return (system, effort, *spent, *taken, size(report["peak_rss_bytes"]), *quality)


def compare_on_real_model(options: argparse.Namespace, console: Console) -> None:
    """Prints the table of a real model: systems and efforts."""
    with tempfile.TemporaryDirectory() as scratch:
        model = real_model(options.real, console.print)
        if options.first:
            model = first_layers(model, options.first, Path(scratch) / model.name)
        lines = []
        for system in options.only:
            for effort in options.efforts if system != "TransMLA" else ["default"]:
                lines.append(real_row(model, system, effort, options))
                console.print(*lines[-1], style="dim")
    columns = ("system", "effort", "tokens", "steps", "CPU s", "CPU s/layer", "seconds", "peak", "KL", "perplexity")
    console.print(table(f"{options.real} at {SHARE:.0%}, {' '.join(options.set)}", columns, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--real", nargs="?", const="SmolLM2-135M-Instruct", metavar="MODEL")
    parser.add_argument("--first", type=int, default=0, metavar="N")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS["mla"], default=["quick", "default"])
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--text", type=Path, default=bundled_text("train"))
    parser.add_argument("--held-out", type=Path, default=bundled_text("valid"))
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    console, lines = Console(width=170, highlight=False), []
    if options.real:
        return compare_on_real_model(options, console)
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

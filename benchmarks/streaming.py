"""Peak memory of a conversion against the size of the checkpoint, each in a process of its own.

    python benchmarks/streaming.py           about ten minutes on two cores, 5 GB of disk

Random Llama-shaped float32 checkpoints of one width and more and more layers: 0.5, 1 and 2 GB. The peak must be flat:
one layer, its statistics, the activations and what Python, torch and transformers take themselves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from anymla.demo import bundled_model
from anymla.report.tables import table
from anymla.report.units import size

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512)
SETTINGS = [
    "--kv-cache",
    "0.25",
    "--rope-dims",
    "64",
    "--calibration-tokens",
    "1024",
    "--calibration-length",
    "128",
    "--reconstruction-steps",  # as much memory as with the default, less time
    "4",
    "--device",
    "cpu",
]
FLAT = 1.15


def make_checkpoint(folder: Path, layers: int) -> int:
    """A random checkpoint in 200 MB shards with the bundled tokenizer; returns the bytes of its weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).save_pretrained(folder, max_shard_size="200MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, folder / name)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def convert(folder: Path) -> tuple[int, float]:
    """Peak bytes and seconds of a conversion in a fresh process."""
    command = [sys.executable, "-c", "from anymla.cli import main; main()", "convert", str(folder)]
    command += ["-o", str(folder.parent / "out"), "--json", *SETTINGS]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["peak_rss_bytes"], report["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    options = parser.parse_args()
    console, rows, peaks = Console(width=120, highlight=False), [], []
    for gigabytes in options.gigabytes:
        layers = round(gigabytes * 1e9 / LAYER_BYTES)
        with tempfile.TemporaryDirectory() as scratch:
            weights = make_checkpoint(Path(scratch) / "model", layers)
            peak, seconds = convert(Path(scratch) / "model")
        peaks.append(peak)
        rows.append((layers, size(weights), size(peak), f"{peak / weights:.2f}", f"{seconds:.0f}"))
        console.print(f"measured {size(weights)}", style="dim")
    console.print(f"{' '.join(SETTINGS)}; a layer is {size(LAYER_BYTES)}")
    console.print(table("Peak memory", ("layers", "weights", "peak", "peak/weights", "seconds"), rows))
    flat, below = max(peaks) <= FLAT * min(peaks), peaks[-1] < options.gigabytes[-1] * 1e9
    console.print(
        f"flat within 15 %: {flat} ({max(peaks) / min(peaks) - 1:+.1%}); below the largest checkpoint: {below}"
    )
    sys.exit(not (flat and below))


if __name__ == "__main__":
    main()

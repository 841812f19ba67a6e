"""What a window of exact keys and values beside the latent brings, and what it costs in contexts of several lengths.

    python benchmarks/window.py MODEL --text train.jsonl.xz --held-out valid.jsonl.xz

Scored in contexts of --length tokens; bytes, those of the window included, are given for contexts of that length and of
4096 tokens, as a share of the original's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from fidelity import Protocol, held_out_windows, sample
from rich.console import Console

import anymla
from anymla.evaluation.scores import score_model
from anymla.io.checkpoint import load_model
from anymla.report.tables import table

LONG = 4096
CASES = ((0.25, 0), (0.25, 64), (0.125, 0), (0.125, 16), (0.125, 64), (0.0625, 0), (0.0625, 64))  # latent, window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24576)
    options = parser.parse_args()
    original, rows = load_model(options.model), []
    sizes = (32768, options.length, options.tokens, options.length)
    protocol = Protocol(tuple(options.text), tuple(options.held_out), *sizes)
    windows = held_out_windows(options.model, protocol)
    whole = score_model(original, windows)
    with tempfile.TemporaryDirectory() as scratch:
        out, text = Path(scratch) / "out", sample(protocol.text, "", Path(scratch))
        common = {"calibration": text, "calibration_length": options.length, "overwrite": True}
        for share, window in CASES:
            anymla.convert(options.model, out, kv_cache=share, exact_window=window, **common)
            scores = score_model(load_model(out), windows, original)
            kept = [
                f"{(scores.cache_bytes_per_token + scores.cache_window_bytes / n) / whole.cache_bytes_per_token:.1%}"
                for n in (options.length, LONG)
            ]
            rows.append((f"{share:.4g}", str(window), *kept, f"{scores.perplexity:.2f}", f"{scores.kl:.3f}"))
    columns = ("latent", "window", f"bytes at {options.length}", f"at {LONG}", "perplexity", "KL")
    title = f"{options.model.name} in contexts of {options.length} tokens; the original: {whole.perplexity:.2f}"
    Console(width=100, highlight=False).print(table(title, columns, rows))


if __name__ == "__main__":
    main()

"""KL and perplexity of a model with fewer layers, for every way in which the step `mka` chooses and merges them.

python benchmarks/depth.py [MODEL] [--ratios 0.1 0.25] [--protect 2 1] [--calibration TEXT] [--text TEXT]

KL is in nats per token, of the original's next tokens against the smaller model's, on text that calibration did not
see.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.evaluation.evaluate import evaluate

ROWS: dict[str, dict[str, str]] = {
    "last": {"strategy": "last"},
    "influence (ShortGPT)": {"strategy": "influence"},
    "angular": {"strategy": "angular"},
    **{
        f"merge, {weight}": {"strategy": "merge", "weight": weight}
        for weight in ("similarity", "code", "delta", "drop", "search")
    },
    "kl": {"strategy": "kl"},
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(bundled_model()))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--protect", type=int, nargs=2, default=[2, 1], help="first and last layers that stay")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--calibration", default=str(bundled_text("train")))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    parser.add_argument("--length", type=int, default=64, help="of a calibration window")
    parser.add_argument("--text", default=str(bundled_text("valid")))
    parser.add_argument("--eval-tokens", type=int, default=8192)
    return parser.parse_args()


def measured(given: argparse.Namespace, settings: dict[str, Any]) -> str:
    """A cell: KL and perplexity of a smaller model, and seconds that it took to make."""
    first, last = given.protect
    common = {
        "protect_first": first,
        "protect_last": last,
        "calibration": given.calibration,
        "calibration_tokens": given.tokens,
        "calibration_length": given.length,
    }
    with tempfile.TemporaryDirectory() as folder:
        output, began = Path(folder) / "out", time.monotonic()
        anymla.run(given.model, output, steps=[{"mka": settings | common}])
        seconds = time.monotonic() - began
        scores = evaluate(output, given.text, given.model, tokens=given.eval_tokens)
        card = (output / "README.md").read_text(encoding="utf-8")
    gone = [line.split("|")[1].strip() for line in card.partition("| layer removed")[2].splitlines()[2:]]
    layers = " ".join(index for index in gone if index)
    return f"{scores.kl:.3f} | {scores.perplexity:.1f} | {layers} | {seconds:.0f}"


def main() -> None:
    """Prints tables in Markdown, a row as soon as it is there."""
    given = arguments()
    for ratio in given.ratios:
        print(f"\n{ratio:.0%} of the layers removed:\n")
        print("| strategy | KL | perplexity | layers removed | seconds |\n|---|---:|---:|---|---:|", flush=True)
        for name in given.rows:
            print(f"| {name} | {measured(given, ROWS[name] | {'ratio': ratio})} |", flush=True)


if __name__ == "__main__":
    main()

"""KL against budget for every way of spreading ranks over layers, of the steps `mla` and `lorc`.

python benchmarks/ranks.py [MODEL] [--budgets 0.5 0.25] [--tokens 8192] [--steps 0]

Every row is a conversion of its own, at the same bytes as the others of its column. KL is in nats per token, of the
original's next tokens against the converted model's, on stories that calibration did not see.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.evaluation.evaluate import evaluate
from anymla.methods.mla.ranks import RANKS


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(bundled_model()))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.125])
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="of a calibration window")
    parser.add_argument("--steps", type=int, default=0, help="gradient steps of the step mla, per layer")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    return parser.parse_args()


def rows(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of the step by the name of a row."""
    text = {"calibration_tokens": given.tokens, "calibration_length": given.length}
    found = {f"mla, {ranks}": {"ranks": ranks, "reconstruction_steps": given.steps, **text} for ranks in RANKS}
    spreads = ("uniform", "linear", "progressive")
    found |= {f"lorc, weights, {ranks}": {"ranks": ranks, "axes": "weights"} for ranks in spreads}
    return found | {"lorc, random tokens, uniform": {}}


def measured(model: str, name: str, settings: dict[str, Any], tokens: int) -> tuple[float, int]:
    """KL of a conversion, and bytes of its cache per token."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        anymla.run(model, output, steps=[{name.split(",")[0]: settings}])
        size = json.loads((output / "account.json").read_text(encoding="utf-8"))["cache_bytes_per_token"]
        scores = evaluate(output, bundled_text("valid"), model, tokens=tokens)
    return float(scores.kl or 0.0), size


def main() -> None:
    """Prints a table in Markdown, a row as soon as it is there."""
    given = arguments()
    print("| ranks |", " | ".join(f"{budget:.1%}" for budget in given.budgets), "|", flush=True)
    print("|---|", "---|" * len(given.budgets), sep="", flush=True)
    for name, settings in rows(given).items():
        cells = []
        for budget in given.budgets:
            kl, size = measured(given.model, name, settings | {"kv_cache": budget}, given.eval_tokens)
            cells.append(f"{kl:.4f} ({size} B)")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()

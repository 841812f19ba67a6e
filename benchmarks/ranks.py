"""KL against budget for every way of spreading ranks over layers, of the steps `mla` and `lorc`.

python benchmarks/ranks.py [MODEL] [--budgets 0.5 0.25] [--only mla] [--tokens 8192] [--steps 0]

Every row is a conversion of its own, at the same bytes as the others of its budget. It is printed as soon as it is
there. KL is in nats per token, of the original's next tokens against the converted model's, on text that calibration
did not see. MODEL is a folder or one of the real models that packages carry, such as SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.evaluation.evaluate import evaluate
from anymla.io.real_models import PACKAGES, real_model
from anymla.methods.mla.ranks import RANKS


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(bundled_model()))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.125])
    parser.add_argument("--only", nargs="+", default=["mla", "lorc"], help="beginnings of the names of rows")
    parser.add_argument("--text", default=str(bundled_text("train")), help="calibration text")
    parser.add_argument("--held-out", default=str(bundled_text("valid")), help="text to score on")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="of a calibration window")
    parser.add_argument("--steps", type=int, default=0, help="gradient steps of the step mla, per layer")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    return parser.parse_args()


def rows(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of the step by the name of a row."""
    text = {"calibration": given.text, "calibration_tokens": given.tokens, "calibration_length": given.length}
    found = {f"mla, {ranks}": {"ranks": ranks, "reconstruction_steps": given.steps, **text} for ranks in RANKS}
    spreads = ("uniform", "linear", "progressive")
    found |= {f"lorc, weights, {ranks}": {"ranks": ranks, "axes": "weights"} for ranks in spreads}
    found |= {"lorc, random tokens, uniform": {}}
    return {name: settings for name, settings in found.items() if name.startswith(tuple(given.only))}


def measured(model: str, name: str, settings: dict[str, Any], given: argparse.Namespace) -> tuple[float, int]:
    """KL of a conversion, and bytes of its cache per token."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        anymla.run(model, output, steps=[{name.split(",")[0]: settings}])
        size = json.loads((output / "account.json").read_text(encoding="utf-8"))["cache_bytes_per_token"]
        scores = evaluate(output, given.held_out, model, tokens=given.eval_tokens)
    return float(scores.kl or 0.0), size


def main() -> None:
    """Prints a table in Markdown, a row as soon as it is there; all rows of one budget before the next one."""
    given = arguments()
    model = str(real_model(given.model)) if given.model in PACKAGES else given.model
    print("| budget | ranks | bytes per token | KL | seconds |\n|---|---|---:|---:|---:|", flush=True)
    for budget in given.budgets:
        for name, settings in rows(given).items():
            began = time.monotonic()
            kl, size = measured(model, name, settings | {"kv_cache": budget}, given)
            print(f"| {budget:.1%} | {name} | {size} | {kl:.4f} | {time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Quality against tuning tokens: four recipes, from the paper's conversion and from ours.

python benchmarks/recovery.py [MODEL ...] [--data TEXT ...] [--held-out TEXT ...] [--tokens 200000] [--kv-cache 0.125]

Prints a table, and writes docs/images/recovery.png and recovery.json beside it. Points along a curve are of one
run, whose learning rate falls to 0 at its end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from testbed.corpus import sample

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.errors import InfeasibleError
from anymla.report.tables import table

matplotlib.use("Agg")

PIECE = 2048  # characters of held-out text in a row: from all over it
IMAGES = Path(__file__).parent.parent / "docs" / "images"
STARTS: dict[str, dict[str, Any]] = {
    "anymla": {},
    "MHA2MLA": {"rope": "two-norm", "factorization": "joint-svd", "expected_rotation": False},
}
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"layerwise": 0.0, "cross_entropy": 1.0, "train": "all", "learning_rate": 1e-4, "warmup": 0.1}
    | {"decay": "1-sqrt", "decay_share": 0.1667},
    "KL": {"train": "attention"},
    "KL, all weights": {},
    "layer-wise, KL": {"layerwise": 0.1, "train": "attention"},
}


def curves_of(model: str, options: argparse.Namespace, scratch: Path, console: Console) -> dict[str, Any]:
    """(tokens, perplexity, KL) along each run, by start and recipe; what cannot be converted is left out."""
    data = sample(options.data, scratch / "data.jsonl")
    held_out = sample(options.held_out, scratch / "held-out.jsonl", piece=PIECE)
    curves: dict[str, Any] = {}
    for start, conversion in STARTS.items():
        try:
            text = {"calibration": data, "calibration_length": options.length}
            anymla.convert(model, scratch / start, kv_cache=options.kv_cache, **text, **conversion)
        except InfeasibleError as error:
            console.print(f"{start}: {error}")
            continue
        for recipe, settings in RECIPES.items():
            output = scratch / f"{start}-{len(curves)}"
            sizes = {"tokens": options.tokens, "length": options.length}
            texts = {"data": data, "eval_data": held_out, "eval_tokens": options.eval_tokens}
            report = anymla.tune(scratch / start, output, teacher=model, **sizes, **texts, **settings)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            scored = [line for line in lines if "eval_kl" in line]
            curves[f"{start}: {recipe}"] = {
                "points": [(line["tokens"], line["eval_perplexity"], line["eval_kl"]) for line in scored],
                "original": report.original_perplexity,
                "gap_closed": report.gap_closed,
                "seconds": report.seconds,
            }
            console.print(f"{start}: {recipe}: {report.gap_closed:.1%} closed in {report.seconds:.0f} s", style="dim")
    return curves


def draw(path: Path, models: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(models), figsize=(9.2, 4.2 * len(models)), layout="constrained", squeeze=False)
    for axes, (model, curves) in zip(rows[:, 0], models.items(), strict=True):
        for name, curve in curves.items():
            tokens, perplexities, _ = zip(*curve["points"], strict=True)
            style = "-" if name.startswith("anymla") else "--"
            axes.plot(tokens, perplexities, style, marker="o", markersize=3, linewidth=1.4, label=name)
        original = next(iter(curves.values()))["original"]
        axes.axhline(original, color="#444444", linestyle=":", linewidth=1, label=f"original: {original:.3g}")
        axes.set(yscale="log", xlabel="tokens learned from", ylabel="held-out perplexity (log scale)", title=model)
        for written in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            written("{x:g}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(bundled_model())])
    parser.add_argument("--data", type=Path, nargs="+", default=[bundled_text("train")])
    parser.add_argument("--held-out", type=Path, nargs="+", default=[bundled_text("valid")])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row: not above what the model has learned")
    parser.add_argument("--kv-cache", type=float, default=0.125)
    options = parser.parse_args()
    console, models = Console(width=120, highlight=False), {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            models[Path(model).name] = curves_of(model, options, Path(scratch), console)
    for model, curves in models.items():
        rows = [
            (name, *(f"{curve['points'][end][1]:.2f}" for end in (0, -1)), f"{kl:.3f}", f"{curve['gap_closed']:.1%}")
            for name, curve in curves.items()
            for kl in [curve["points"][-1][2]]
        ]
        title = f"{model} at {options.kv_cache:.4g} of its cache, {options.tokens:,} tokens"
        console.print(table(title, ("start: recipe", "before", "after", "KL", "gap closed"), rows))
    (IMAGES / "recovery.json").write_text(json.dumps(models, indent=2) + "\n")
    draw(IMAGES / "recovery.png", models)


if __name__ == "__main__":
    main()

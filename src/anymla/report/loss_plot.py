"""The picture of a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def loss_plot(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws the loss of every step and the held-out perplexity against tokens, to ``path`` (.png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7.2, 5.2), layout="constrained")
    for stage in dict.fromkeys(line["stage"] for line in lines):
        steps = [line for line in lines if line["stage"] == stage and "loss" in line]
        above.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], linewidth=1, label=stage)
    scored = [line for line in lines if "eval_perplexity" in line]
    tokens = [line["tokens"] for line in scored]
    below.plot(tokens, [line["eval_perplexity"] for line in scored], marker="o", color="#0b6e4f", label="tuned")
    original = [line["original_perplexity"] for line in scored]
    below.plot(tokens, original, linestyle="--", color="#444444", linewidth=1, label="original")
    above.set_ylabel("loss (log scale)")
    below.set_ylabel("held-out perplexity (log scale)")
    below.set_xlabel("tokens learned from")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""Plots that a person would rather look at than read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path


def quality_plot(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    original: tuple[float, float],
    own: Collection[str],
) -> None:
    """Draws perplexity against measured cache bytes per token, a curve per method, to ``path`` (.png or .svg).

    ``own``: the methods to draw heavier.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for (name, points), marker in zip(curves.items(), "os^DvP", strict=False):
        heavy = name in own
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=marker,
            label=name,
            linewidth=2.4 if heavy else 1.2,
            color="#0b6e4f" if heavy else None,
            alpha=1 if heavy else 0.75,
            zorder=3 if heavy else 2,
        )
    axes.axhline(original[1], color="#444444", linestyle="--", linewidth=1)
    axes.annotate(
        f"original: {original[1]:.3g} at {original[0]:g} bytes per token",
        (0.01, original[1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
        color="#444444",
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=original[1] * 0.7)
    axes.set_xlim(left=0)
    top = max(perplexity for points in curves.values() for _, perplexity in points)
    ticks = [tick * 10**power for power in range(8) for tick in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if original[1] / 2 < tick < 2 * top])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("KV cache, measured bytes per token")
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.set_title("Quality against KV cache, training-free")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

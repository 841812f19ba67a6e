"""The page and the plot of the benchmark of bytes, from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from page import table

Row = dict[str, Any]
OURS_CHEAP, OURS = "anymla, decode cost 2", "anymla"
KNOWN = {  # systems of the README's picture, and what it calls them
    OURS_CHEAP: "anymla, default",
    OURS: "anymla, any decode cost",
    "transformers QuantizedCache (HQQ)": "quantised cache of transformers",
    "KIVI-like": "KIVI-like",
    "KVQuant": "KVQuant",
    "KVTC-like": "KVTC-like",
    "static NUQ tables": "static tables",
    "CARE": "CARE",
    "TransMLA": "TransMLA",
    "MHA2MLA": "MHA2MLA",
}
MOST = {OURS_CHEAP: 1 / 2, OURS: 1 / 3}  # aims: KL over that of the best other at the same bytes
AIMED = (0.25, 0.1875, 0.125, 0.0625)
PERPLEXITY = {0.25: 0.005, 0.125: 0.03, 0.0625: 0.15}  # aims of the two real models: at most so much more
REAL = ("SmolLM2", "gemma")
NAMES = {0.5: "50 %", 0.25: "25 %", 0.1875: "18.75 %", 0.125: "12.5 %", 0.0625: "6.25 %"}
INTRODUCTION = """# Quality per byte

Made by `python benchmarks/bytes.py`. Nothing here is trained. Every system sees calibration text once, and is scored
on held-out text that calibration has not seen. KL (nats per token) and same top token are to the original. Its cache
of 16-bit numbers is 100 %. Of another system's cases, the best at the same bytes counts, by the scores themselves.

**Bytes are counted whole**, over the tokens of a scored window. They include codes, indices, and the scales and zero
points of every token and group. They also include what a sequence holds exactly in 16-bit numbers: first tokens, a
recent window. In longer contexts that part shrinks, and `per token` is what remains. Tables and bases are weights,
and are counted for no system.

**Some rows are older than three changes.** Calibration windows now [begin with the BOS
token](choices.md#windows-begin-with-the-bos-token), bases [do not hang on a few
tokens](choices.md#a-few-tokens-hold-most-of-the-fisher-matrix), and levels [reach beyond calibration
text](choices.md#levels-reach-beyond-calibration-text). Gemma 3 and SmolLM2 were measured anew. Older are all rows of
stories260K and gqa. On SmolLM2, those of KVQuant, TransMLA, MHA2MLA and the QuantizedCache are older too.

How each is measured:

- **anymla** is the method `transform_coding` through `anymla.run`. Bytes are those of the live cache. The first 4
  tokens and a window of the latest 16 are exact. Keys are rebuilt when they are read, at any cost. With decode cost
  2, the default, decoding takes at most twice the multiply-adds of the original's attention.
- **anymla, mla + transform coding** and **mla + kvquant** first run the step `mla` to a share of the numbers, without
  gradient steps. The latent and the rope key are then coded. The first 4 tokens are exact, and there is no window.
- **KVQuant** is this project's method `kvquant` (arXiv 2401.18079), measured like `transform_coding`.
- All others work on the original, in a simulation. Keys and values are coded and decoded inside its attention. Every
  query reads exactly the tokens that the system would still hold exactly.
- **static NUQ tables** are Lloyd's levels per channel, with keys before rope and the first 4 tokens exact.
- **KVTC-like** (arXiv 2511.01815) has principal axes, and bits by least squared error over all layers. It has no
  entropy coder, and Lloyd's levels in place of uniform ones. The first 4 tokens are exact. It has a window of the
  latest 16 (the paper: 128), or none.
- **KIVI-like** (arXiv 2402.02750) codes keys per channel in groups of 32 tokens, and values per token in groups of 32
  numbers. Its residual window is 32 tokens, because its 128 would outweigh the codes at these lengths.
- **Hadamard int per token** rotates heads by a Hadamard matrix. It stores integers with a scale and a zero point per
  token.
- **transformers QuantizedCache (HQQ)** is transformers' own cache object, with groups of 64 along a token. A window
  runs through it in chunks of 16 tokens, so later ones read the codes of the earlier ones.
- **CARE** (arXiv 2603.17946) before partial rope, **TransMLA** (arXiv 2502.07864) and **MHA2MLA** (arXiv 2502.14837)
  are latents of 16-bit numbers. With *NUQ tables*, static levels code what they cache, and the first 4 tokens are
  exact.

**Aims.** KL should be at most half of the best other's at the default decode cost, and a third at any cost. On the two
real models, perplexity should grow by at most 0.5, 3 and 15 % at 25, 12.5 and 6.25 %. An aim that is missed stands in
brackets. Why they are missed:

- **KL** meets all aims on both, but that of SmolLM2 at 18.75 % and the default decode cost, by 0.01. There the bound on
  multiply-adds leaves room to rebuild few keys.
- **Perplexity** of SmolLM2 misses at the default decode cost, at 12.5 and 6.25 %. Gemma 3 misses on WikiText, which is
  not like the calibration text: it has `<unk>`, and spaces before commas. On stories it meets the aims, but for the
  default at 6.25 %, by 0.5 %.
- **Gemma 3** has one KV head of 256 dims, so rebuilding a coefficient costs 256 multiply-adds. The default allows 12 of
  256 coefficients, and a plan then has no better axes for keys than their own dims ([what limits
  it](benchmarks.md#gemma-3-270m-what-limits-it)).
- **Exact tokens** add 3.7 % of the original's bytes in windows of 512, and are counted. So at 6.25 %, more than a third
  of what is counted is not codes. In 8,192 tokens they add 0.2 %.
"""


def at_bytes(points: list[tuple[float, float]], share: float) -> float | None:
    """A system's KL at ``share`` of the bytes: between two of its (share, KL) points, straight in the logarithms.

    Points that have another with fewer bytes and less KL do not count. None: the system has none so small.
    """
    best = _envelope(sorted(points))
    below = [point for point in best if point[0] <= share]
    above = [point for point in best if point[0] > share]
    if not below or not above:
        return below[-1][1] if below else None
    (x0, y0), (x1, y1) = below[-1], above[0]
    part = math.log(share / x0) / math.log(x1 / x0)
    return math.exp((1 - part) * math.log(max(y0, 1e-9)) + part * math.log(max(y1, 1e-9)))


def points_of(rows: Iterable[Row], system: str) -> list[tuple[float, float]]:
    """(share, KL) of a system's rows."""
    return sorted((row["share"], row["kl"]) for row in rows if row["system"] == system and "kl" in row)


def best_other(rows: list[Row], share: float) -> tuple[float, str] | None:
    """The least KL at ``share`` of the bytes of all systems but ours, and whose it is."""
    others = {row["system"] for row in rows if not row["system"].startswith("anymla")}
    found = {name: at_bytes(points_of(rows, name), share) for name in others}
    return min(((kl, name) for name, kl in found.items() if kl is not None), default=None)


def _verdict(value: float, most: float) -> str:
    return f"{value:.2f}" if value <= most else f"{value:.2f} (aim {most:.2f})"


def _compared(rows: list[Row]) -> list[list[str]]:
    """A line per budget that has an aim: ours at both decode costs beside the best other at the same bytes."""
    lines = []
    for budget in AIMED:
        cells = [NAMES[budget]]
        for system in (OURS_CHEAP, OURS):
            row = next((row for row in rows if row["system"] == system and row["case"] == f"{budget:.4g}"), None)
            best = None if row is None or "kl" not in row else best_other(rows, row["share"])
            if row is None or best is None:
                cells += ["-"] * 4
                continue
            more = row["perplexity"] / row["original"]["perplexity"] - 1
            most = PERPLEXITY.get(budget) if row["model"].startswith(REAL) else None
            missed = "" if most is None or more <= most else f" (aim {most:+.1%})"
            ratio = _verdict(row["kl"] / best[0], MOST[system])
            cells += [f"{row['kl']:.4f}", f"{best[0]:.4f} ({best[1]})", ratio, f"{more:+.1%}{missed}"]
        lines.append(cells)
    return [line for line in lines if line[1:] != ["-"] * 8]


def _row_cells(row: Row) -> list[str]:
    if "infeasible" in row:
        return [row["system"], row["case"], "does not fit", *["-"] * 4]
    quality = [f"{row['kl']:.4f}", f"{row['perplexity']:.2f}", f"{row['top1_agreement']:.1%}"]
    each = [f"{text['kl']:.4f}" for text in row["texts"].values()] if len(row["texts"]) > 1 else []
    return [row["system"], row["case"], f"{row['share']:.2%}", f"{row['bytes_per_token']:.4g}", *quality, *each]


def _protocol(row: Row) -> str:
    used, original = row["protocol"], row["original"]
    return (
        f"Calibration: {used['calibration_tokens']:,} tokens of {', '.join(used['text'])}. Scored: {used['windows']} "
        f"windows of {used['length']} tokens of each of {', '.join(used['held_out'])}. The original: perplexity "
        f"{original['perplexity']:.2f}, {original['bytes']:,} bytes per token. Four exact first tokens are "
        f"{4 / used['length']:.2%} of a window."
    )


def write_page(path: Path, rows: list[Row], systems: list[str]) -> None:
    """Writes the comparison with the aims and all rows, a section per model."""
    lines = [INTRODUCTION, "![KL against bytes](images/bytes.png)", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        mine.sort(key=lambda row: (systems.index(row["system"]), -row.get("share", 0)))
        lines += [f"## {model}", "", _protocol(mine[0]), ""]
        if compared := _compared(mine):
            lines += ["Ours beside the best other at the same bytes, between whose points KL is interpolated:", ""]
            names = ["KL", "best other's KL", "ratio", "perplexity"]
            columns = [
                "cache size",
                *(f"default: {name}" for name in names),
                *(f"decode cost any: {name}" for name in names),
            ]
            lines += table(columns, compared)
        texts = list(mine[0].get("texts", {}))
        each = [f"KL on {name}" for name in texts] if len(texts) > 1 else []
        columns = ["system", "case", "bytes", "per token", "KL", "perplexity", "same top token", *each]
        lines += table(columns, [_row_cells(row) for row in mine])
    path.write_text("\n".join(lines).rstrip() + "\n")


def plot(path: Path, rows: list[Row], systems: list[str]) -> None:
    """KL against the share of the bytes, both on a log axis: a panel per model, a curve per system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows if "kl" in row))
    if not models:
        return
    columns = 2 if len(models) in (2, 4) else min(3, len(models))
    size = (5.2 * columns, 4.6 * -(-len(models) // columns) + 0.9)
    figure, grid = pyplot.subplots(
        -(-len(models) // columns), columns, figsize=size, layout="constrained", squeeze=False
    )
    shown: dict[str, Any] = {}
    for model, axes in zip(models, grid.flat, strict=False):
        _panel(axes, model, [row for row in rows if row["model"] == model], systems, shown)
    for axes in list(grid.flat)[len(models) :]:
        axes.axis("off")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_model(path: Path, rows: list[Row], model: str) -> None:
    """The README's picture: one model, the systems that readers know, by names that they know."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mine = [row for row in rows if row["model"] == model]
    figure, axes = pyplot.subplots(figsize=(9.2, 4.6), layout="constrained")
    shown: dict[str, Any] = {}
    _panel(axes, model, mine, list(KNOWN), shown)
    figure.legend(shown.values(), map(KNOWN.get, shown), loc="outside right upper", frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _envelope(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points without those that have another with fewer bytes and less KL."""
    return [(share, kl) for share, kl in points if not any(s < share and k < kl for s, k in points)]


def _panel(axes: Any, model: str, rows: list[Row], systems: list[str], shown: dict[str, Any]) -> None:
    """A model's curves; ``shown`` takes one of each system."""
    for number, system in enumerate(systems):
        if curve := _envelope(points_of(rows, system)):
            percent, kls = [100 * share for share, _ in curve], [kl for _, kl in curve]
            style = {"marker": "oosv^DPX*<>hpd"[number % 14]} | _style(number, system)
            (shown[system],) = axes.plot(percent, kls, **style)
    axes.set(xscale="log", yscale="log", title=model, xlabel="KV cache, % of the original's 16-bit bytes")
    axes.set_ylabel("KL to the original, nats per token")
    axes.set_xticks([3.125, 6.25, 12.5, 25, 50], ["3.1", "6.25", "12.5", "25", "50"])
    axes.minorticks_off()
    axes.set_xlim(2.8, 62)
    axes.grid(alpha=0.25)


def _style(number: int, system: str) -> dict[str, Any]:
    """Ours thick, 16-bit latents grey, the others thin."""
    if system in (OURS_CHEAP, OURS):
        return {"color": "#0b6e4f", "linewidth": 3, "linestyle": "--" if system == OURS else "-", "zorder": 5}
    grey = system.startswith(("CARE", "TransMLA", "MHA2MLA"))
    return {
        "color": "#999999" if grey else f"C{number if number < 7 else 9}",
        "linewidth": 1.1,
        "alpha": 0.85,
        "markersize": 4,
    }

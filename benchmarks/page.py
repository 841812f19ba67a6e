"""The page and the plot of the fidelity benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sensitivity import PARTS

Row = dict[str, Any]
INTRODUCTION = """# Fidelity

Made by `python benchmarks/fidelity.py`. All conversions are training-free. anymla's own takes gradient steps, one
layer at a time, against the original layer's output. It sees no labels, and its gradients go through one layer only.

- **Scores.** KL (nats per token) and same top token are to the original, on held-out text. Neither calibration nor
  any choice of settings has seen that text. If it has several domains, windows are drawn from all of it.
- **Bytes** per token are read from the live cache. Those of CARE without partial RoPE are counted instead, because no
  cache here holds them. It rebuilds and rotates all keys at every step, and cannot decode from the latent.
- **Numbers have 16 bits** in all methods here. In as many bytes, codes lose far less ([bytes.md](bytes.md)).
- **The exact window** (`--exact-window`) takes half of the bytes in contexts as long as those scored, and the latent
  the other half. In longer contexts the window's part becomes negligible. Older rows count one token more: the
  newest, which the cache does not hold between steps.
- **Settings.** A method with settings gets those that do best on calibration text that was not fitted on.
- **Seconds** are those of the whole row: the tries, the conversion and the scoring. Peak memory is that of the row's
  process. Most of it is Python, torch and transformers.
- **Real models** were measured beside other work, so their seconds are high. Alone on two cores, a conversion of
  SmolLM2-135M-Instruct at 25 % takes 576 s. At 31.25 and 12.5 %, TransMLA has the setting that was its best
  at 25 %. At 12.5 % it was also run with 16 rotated dims, and the better one is shown. Our `--effort best` has a KL
  of 0.304 at 25 %. It takes 65,536 tokens of calibration and about 65 minutes ([choices.md](choices.md#effort)).
"""


THIN = {"linewidth": 1.2, "alpha": 0.8}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(columns: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown, its first column left-aligned."""
    return [_line(columns), _line(["---"] + ["---:"] * (len(columns) - 1)), *map(_line, lines), ""]


def _settings(row: Row) -> str:
    chosen = {name: value for name, value in row.get("settings", {}).items() if name != "expected_rotation"}
    return ", ".join("filled ranks" if name == "filled" else str(value) for name, value in chosen.items())


def _quality(row: Row) -> list[str]:
    if "infeasible" in row:
        return ["-", "does not fit", "-", "-"]
    kl = f"{row['kl']:.3f}"
    return [f"{row['cache_bytes_per_token']:g}", _number(row["perplexity"]), kl, f"{row['top1_agreement']:.1%}"]


def _cost(row: Row) -> list[str]:
    if "infeasible" in row:
        return ["-", "-"]
    return [f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] >> 20} MiB"]


def _protocol(row: Row) -> str:
    used = row["protocol"]
    return (
        f"Calibration: {used['calibration_tokens']:,} tokens of {', '.join(used['text'])} in windows of "
        f"{used['calibration_length']}. Scored: {row['original']['tokens']:,} tokens of {', '.join(used['held_out'])} "
        f"in windows of {used['length']}. The original: perplexity {_number(row['original']['perplexity'])}, "
        f"{row['original']['cache_bytes_per_token']:g} bytes per token."
    )


def _against_peers(compared: list[Row]) -> list[list[str]]:
    """Per budget: our KL beside that of the best method that can decode from its latent, and of CARE's that cannot."""
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in compared):
        found = {row["method"]: row for row in compared if row["budget"] == budget and "kl" in row}
        ours, rebuilt = found.pop("anymla", None), found.pop("CARE without partial RoPE", None)
        window = found.pop("anymla, exact window", None)
        if ours is None or (rebuilt is None and not found):
            continue
        best = min(found.values(), key=lambda row: row["kl"], default=None)
        lines.append(
            [
                f"{budget:.4g}",
                f"{ours['kl']:.3f}",
                *(["-"] * 2 if best is None else [f"{best['kl']:.3f} ({best['method']})", _ratio(ours, best)]),
                "-" if rebuilt is None else f"{rebuilt['kl']:.3f}",
                _more(ours),
                *(
                    ["-"] * 3
                    if window is None or best is None
                    else [f"{window['kl']:.3f}", _ratio(window, best), _more(window)]
                ),
            ]
        )
    return lines


def _ratio(row: Row, other: Row) -> str:
    return f"{row['kl'] / other['kl']:.2f}"


def _more(row: Row) -> str:
    return f"{row['perplexity'] / row['original']['perplexity'] - 1:+.1%}"


def _variations(rows: list[Row], ours: list[Row]) -> list[str]:
    """The default method varied: its scores, or where it was probed what both models find again."""
    if "probe" in rows[0]:
        columns = ["cache size", "probe", "chance", "original", "converted", "standard error of the difference"]
        return table(columns, [line for row in rows for line in _probed(row)])
    columns = ["cache size", "case", "bytes", "perplexity", "KL", "same top token", "original's perplexity"]
    budgets = dict.fromkeys(row["budget"] for row in rows)
    whole = ours if rows[0]["group"] == PARTS else []
    shown = [row for budget in budgets for row in (*whole, *rows) if row["budget"] == budget]
    return table(
        columns,
        [
            [
                f"{row['budget']:.4g}",
                row.get("case") or "the default",
                *_quality(row),
                _number(row["original"]["perplexity"]),
            ]
            for row in shown
        ],
    )


def _probed(row: Row) -> list[list[str]]:
    """Each measure over all lengths and depths."""
    return [
        [
            f"{row['budget']:.4g}",
            f"{measure['name']}: {measure['metric']}",
            f"{measure['chance']:.3f}",
            f"{measure['original']['value']:.3f}",
            f"{measure['model']['value']:.3f}",
            f"{measure['difference_stderr']:.3f}",
        ]
        for measure in row["probe"]
        if measure["part_of"] is None
    ]


def write_page(path: Path, rows: list[Row], methods: Iterable[str]) -> None:
    """Writes all rows as tables, a section per model."""
    lines, methods = [INTRODUCTION], list(methods)
    if any(not row.get("case") for row in rows):
        lines += ["![KL and perplexity against the size of the cache](images/fidelity.png)", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        compared = sorted(
            (row for row in mine if not row.get("case")), key=lambda row: (-row["budget"], methods.index(row["method"]))
        )
        lines += [f"## {model}", ""]
        if scored := [row for row in compared if "original" in row]:
            lines += [_protocol(scored[0]), ""]
            columns = [
                "cache size",
                "method",
                "bytes",
                "perplexity",
                "KL",
                "same top token",
                "seconds",
                "peak memory",
                "settings",
            ]
            lines += table(
                columns,
                [
                    [f"{row['budget']:.4g}", row["method"], *_quality(row), *_cost(row), _settings(row)]
                    for row in compared
                ],
            )
            columns = ["cache size", "KL", "best peer that absorbs", "ratio", "CARE without partial RoPE", "perplexity"]
            columns += ["exact window: KL", "ratio", "perplexity"]
            lines += ["Against the best of them:", "", *table(columns, _against_peers(scored))]
        ours = [row for row in scored if row["method"] == "anymla"]
        for group in dict.fromkeys(row["group"] for row in mine if row.get("case")):
            lines += [f"### {group}", "", *_variations([row for row in mine if row.get("group") == group], ours)]
    path.write_text("\n".join(lines).rstrip() + "\n")


def plot(path: Path, rows: list[Row], methods: Iterable[str]) -> None:
    """KL and perplexity against the share of the bytes, a row of axes per model, a curve per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if not row.get("case") and "infeasible" not in row]
    models = list(dict.fromkeys(row["model"] for row in shown))
    if not models:
        return
    figure, grid = pyplot.subplots(
        len(models), 2, figsize=(10.5, 4.2 * len(models)), layout="constrained", squeeze=False
    )
    for model, pair in zip(models, grid, strict=True):
        mine = [row for row in shown if row["model"] == model]
        shares = sorted({100 * row["budget"] for row in mine})
        for axes, name in zip(pair, ("kl", "perplexity"), strict=True):
            for number, method in enumerate(methods):
                points = sorted(
                    (100 * row["cache_bytes_per_token"] / row["original"]["cache_bytes_per_token"], row[name])
                    for row in mine
                    if row["method"] == method
                )
                if points:
                    thin = THIN | {"color": f"C{number - 2}"}  # a method's own in every model
                    style = {"color": "#0b6e4f", "linewidth": 2.4, "linestyle": "-:"[number]} if number < 2 else thin
                    axes.plot(*zip(*points, strict=True), marker="os^DvPX*"[number % 8], label=method, **style)
            axes.set(xscale="log", yscale="log", xlabel="KV cache, % of the original's bytes", title=model)
            axes.set_ylabel("KL to the original, nats per token" if name == "kl" else "perplexity")
            axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        pair[1].axhline(mine[0]["original"]["perplexity"], color="#444444", linestyle="--", linewidth=1)
        pair[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

"""The page of the benchmark of long contexts, from its rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page import table

Row = dict[str, Any]
MOST = 1.25  # aim: KL in a long context over that of the same tokens in short windows
INTRODUCTION = """# Long contexts

Made by `python benchmarks/long_context.py`. Nothing here is trained. KL is to the original, in nats per token.

- **By position.** One held-out text is one long context. The columns are positions in it. One text is little: single
  figures are uncertain, and a later part of it may be harder than an earlier one.
- **Ratio.** So the same text is scored again in windows of 512 tokens. `ratio` is the KL of a part's tokens in the long
  context, over the KL of the same tokens in these windows. The aim is at most 1.25 for every part.
- **Probe.** `copy` is the share of tokens that are found when rows of random tokens come again. Eight such rows are
  spread over the context. `needle` is the mean probability of a word that was planted half-way. It is one of eight, so
  chance is 0.125.
- **Cache.** All its bytes at the length that is scored, exact tokens too, over the original's.
- **Layers.** A model with sliding windows is also measured with codes in its sliding layers alone, and in its full
  ones alone. The other layers then have the original's attention and cache.

**Rows of SmolLM2 in 4,096 tokens are older than three changes** of
[windows](choices.md#windows-begin-with-the-bos-token), [bases](choices.md#a-few-tokens-hold-most-of-the-fisher-matrix)
and [levels](choices.md#levels-reach-beyond-calibration-text). All others are not.
"""


def write_page(path: Path, rows: list[Row]) -> None:
    """Writes all rows, a section per model and protocol."""
    lines = [INTRODUCTION]
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(f"{row['model']}, {row['protocol']['length']:,} tokens", []).append(row)
    for title, mine in sections.items():
        lines += [f"## {title}", "", _protocol(mine[0]), ""]
        scored = [row for row in mine if "buckets" in row]
        if any(row["calibration"] for row in scored):
            lines += ["KL by position:", "", *_by_position(scored, lambda bucket: f"{bucket['kl']:.4f}", ratios=True)]
        lines += [
            "Perplexity by position:",
            "",
            *_by_position(scored, lambda bucket: f"{math.exp(bucket['loss']):.2f}"),
        ]
        probed = [[*_names(row), f"{row['copy']:.1%}", f"{row['needle']:.3f}"] for row in scored if "copy" in row]
        if probed:
            lines += [f"Probe, {mine[0]['protocol']['probe']:,} tokens:", ""]
            lines += table(["system", "calibrated on", "layers", "cache", "copy", "needle"], probed)
        lines += [f"- {row['case']}: {row['refused']}" for row in mine if "refused" in row]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _protocol(row: Row) -> str:
    return f"Scored: {row['protocol']['length']:,} tokens of {row['protocol']['held_out']}."


def _names(row: Row) -> list[str]:
    used = row["calibration"]
    told = "-" if used is None else f"{used['tokens']:,} tokens of {used['text']}, windows of {used['length']:,}"
    return [row["case"], told, row["layers"], f"{row['share']:.1%}"]


def _by_position(rows: list[Row], cell: Callable[[dict[str, float]], str], *, ratios: bool = False) -> list[str]:
    """A line per row, a column per part of the context; with ``ratios``, those of KL behind each."""
    starts = [int(bucket["start"]) for bucket in rows[0]["buckets"]]
    columns = ["system", "calibrated on", "layers", "cache", *(f"from {start:,}" for start in starts)]
    lines = [
        [*_names(row), *(cell(bucket) + (_ratio(bucket) if ratios else "") for bucket in row["buckets"])]
        for row in rows
        if row["calibration"] or not ratios  # the original has no KL
    ]
    return table(columns, lines)


def _ratio(bucket: dict[str, float]) -> str:
    """KL in the long context over that in short windows, for positions that these do not have."""
    if not bucket["start"]:
        return ""
    ratio = bucket["kl"] / bucket["short_kl"]
    return f" (ratio {ratio:.2f}{', missed' if ratio > MOST else ''})"

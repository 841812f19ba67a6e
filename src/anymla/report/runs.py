"""Tables of recipes: what every step of a run made, and which steps there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from anymla.report.tables import size, table

if TYPE_CHECKING:
    from anymla.runner import RunOutcome


def run_table(outcome: RunOutcome) -> Table:
    """The account after every step, and the quality where a text was scored."""
    scored = any(step.quality for step in outcome.steps)
    columns = ["step", "weights", "cache per token", f"cache at {outcome.context:,}", "seconds"]
    rows = []
    for step in outcome.steps:
        account, quality = step.account, step.quality or {}
        row = [
            step.name,
            "-" if account["weight_bytes"] is None else size(account["weight_bytes"]),
            f"{account['cache_bytes_per_token']:,} B",
            size(account["cache_bytes_at_context"]),
            f"{step.seconds:.0f}",
        ]
        rows.append([*row, *(_score(quality, name) for name in ("perplexity", "kl") if scored)])
    return table("After every step", [*columns, *(["perplexity", "KL"] if scored else [])], rows)


def _score(quality: Mapping[str, Any], name: str) -> str:
    value = quality.get(name)
    return "-" if value is None else f"{value:.3f}"


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The steps in the order in which a recipe has them."""
    columns = ("step", "phase", "saves", "goes with", "paper")
    shown = [
        (
            row["name"],
            row["phase"],
            ", ".join(row["saves"]) or "-",
            ", ".join(row["composes_with"]) or "-",
            row["paper"],
        )
        for row in rows
    ]
    return table("Steps of recipes", columns, shown)

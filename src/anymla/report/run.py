"""What a run tells: bytes and quality after every step."""

from __future__ import annotations

from rich.table import Table

from anymla.report.tables import size, table
from anymla.run_outcome import Cost, Quality, RunReport, StepOutcome


def run_table(report: RunReport) -> Table:
    """What the original and every step's model cost, and how good they are where a text was given."""
    outcomes = (report.original, *report.steps)
    rows = []
    for number, outcome in enumerate(outcomes):
        cost, quality = outcome.account, outcome.quality
        scores = ("-",) * 3 if quality is None else _scores(quality)
        rows.append((f"{number} {outcome.name}" if number else outcome.name, *_costs(cost), *scores))
    context = report.original.account.context
    columns = (
        "after step",
        "weights",
        "cache per token",
        "+ once",
        f"at {context:,} tokens",
        "perplexity",
        "KL",
        "top-1",
    )
    return table(str(report.output), columns, rows)


def outcome_line(number: int, outcome: StepOutcome) -> str:
    """What the model costs after a step, and how good it is, in one line."""
    cost, quality = outcome.account, outcome.quality
    weights, token, once, at = _costs(cost)
    if cost.bits_per_weight is not None:
        weights += f" ({cost.bits_per_weight:.2f} bits per packed weight)"
    line = f"{f'after step {number}, ' if number else ''}{outcome.name}: weights {weights}, cache {token} per token"
    line += f"{f' and {once} once' if cost.cache_bytes_once else ''}, {at} at {cost.context:,} tokens"
    if quality is None:
        return line
    perplexity, kl, top1 = _scores(quality)
    return f"{line}; perplexity {perplexity}" + ("" if quality.kl is None else f", KL {kl}, top-1 {top1}")


def _costs(cost: Cost) -> tuple[str, str, str, str]:
    """Bytes of weights, of a token's cache, of what is there once, and of the cache at the context."""
    weights = "?" if cost.weight_bytes is None else size(cost.weight_bytes)
    return weights, size(cost.cache_bytes_per_token), size(cost.cache_bytes_once), size(cost.cache_bytes_at_context)


def _scores(quality: Quality) -> tuple[str, str, str]:
    """Perplexity, KL and top-1 agreement."""
    kl = "-" if quality.kl is None else f"{quality.kl:.4f}"
    top1 = "-" if quality.top1_agreement is None else f"{quality.top1_agreement:.1%}"
    return f"{quality.perplexity:.3f}", kl, top1

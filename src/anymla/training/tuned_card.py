"""What tuning adds to the model card."""

from __future__ import annotations

from anymla.cards import public_name
from anymla.training.outcome import Recovery

HEADING = "\n## Tuned\n"


def tuned_card(card: str, report: Recovery) -> str:
    """The converted model's README.md with a section on this tuning. The section of an earlier tuning stays."""
    tuning = report.tuning
    rows = "\n".join(
        f"| {name} | {quality.perplexity:.4g} | {quality.kl:.4g} |"
        for name, quality in (("before", report.before), ("after", report.after))
    )
    texts = ", ".join(public_name(data) for data in tuning.data or [])
    return f"""{card.rstrip()}
{HEADING}
By anymla {report.anymla_version}, on {report.tokens:,} tokens of {texts},
`--train {tuning.train}`. All settings are in `tuning.yaml`. Its progress is in `metrics.jsonl` and `report.html`.
On held-out text, where the original has a perplexity of {report.original_perplexity:.4g}:

| | perplexity | KL to the original |
|---|---:|---:|
{rows}
"""

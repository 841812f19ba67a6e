"""What tuning returns, with its stable JSON names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anymla.methods.tune import Tune


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Perplexity and KL to the original (nats per token) on the held-out text."""

    perplexity: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a tuning did: scores on held-out text before and after, the original's perplexity, tokens and seconds."""

    output: Path
    tuning: Tune
    before: Quality
    after: Quality
    original_perplexity: float
    tokens: int
    steps: int
    seconds: float
    anymla_version: str

    @property
    def helped(self) -> bool:
        """Whether any score was better than the start's; else the model is as it came."""
        return self.after != self.before

    @property
    def gap_closed(self) -> float:
        """Share of the gap in log-perplexity to the original that was closed; 0 where there was none."""
        gap = math.log(self.before.perplexity / self.original_perplexity)
        return math.log(self.before.perplexity / self.after.perplexity) / gap if gap > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        facts = {
            name: value for name, value in vars(self).items() if name not in ("output", "tuning", "before", "after")
        }
        return {
            "output": str(self.output),
            "recipe": self.tuning.model_dump(),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "gap_closed": self.gap_closed,
            **facts,
        }

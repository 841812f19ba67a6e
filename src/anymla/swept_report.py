"""What every conversion reports of its sweep."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla import __version__
from anymla.account import Account
from anymla.io.device import peak_rss
from anymla.io.sources.plain import Plain

if TYPE_CHECKING:
    from anymla.sweep.run import Swept


def reported(
    done: Swept, source: Plain, output: Path, caches: tuple[Account, Account], started: float
) -> dict[str, Any]:
    """Scores on held-out text, and all else that :class:`ConversionReport` has but for caches at several lengths.

    ``caches``: of the original and of the new model. ``started``: when, by ``time.monotonic``.
    """
    from anymla.evaluation.held_out import held_out_scores

    before, after = held_out_scores(
        done.source, done.windows, done.original, done.converted, caches=caches, tuples=done.tuples
    )
    return {
        "output": output.absolute(),
        "spec": done.spec,
        "before": before,
        "after": after,
        "commit": source.commit,
        "notes": (*source.notes, *done.source.notes),
        "computing": done.computing,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss(),
        "anymla_version": __version__,
    }

"""The corridor of `anymla tune`: the step, then the page of what it did."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from anymla.distributed import rank
from anymla.report.tuning import tuning_page
from anymla.training import tune as step
from anymla.training.logs import read_metrics
from anymla.training.outcome import Recovery

Arguments = ParamSpec("Arguments")


def _with_page(train: Callable[Arguments, Recovery]) -> Callable[Arguments, Recovery]:
    """``train``, after which the first process writes report.html beside the tuned weights."""

    @wraps(train)
    def told(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Recovery:
        report = train(*args, **kwargs)
        if rank() == 0:
            page = tuning_page(report, str(kwargs["teacher"]), read_metrics(report.output))
            page.write(report.output)
        return report

    return told


tune = _with_page(step.tune)

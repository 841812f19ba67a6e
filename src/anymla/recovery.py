"""The corridor of `anymla tune`: the step, then the picture of what it did."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from anymla.distributed import rank
from anymla.report.loss_plot import loss_plot
from anymla.training import tune as step
from anymla.training.logs import read_metrics
from anymla.training.outcome import Recovery

Arguments = ParamSpec("Arguments")


def _with_picture(train: Callable[Arguments, Recovery]) -> Callable[Arguments, Recovery]:
    """``train``, after which the first process draws loss.png beside the tuned weights."""

    @wraps(train)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Recovery:
        report = train(*args, **kwargs)
        if rank() == 0:
            loss_plot(report.output / "loss.png", read_metrics(report.output))
        return report

    return drawn


tune = _with_picture(step.tune)

"""What is checked before any model is read."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import TrainerCallback

from anymla.data.mixture import check_data
from anymla.errors import RecipeError
from anymla.io.device import pick_device
from anymla.methods.tune import Tune
from anymla.training.stages import check_device

REPORTERS = ("tensorboard", "trackio")


def check_early(tuning: Tune, report_to: list[str] | None) -> None:
    """Refuses texts, a device and reporters that are not there, before any model is read.

    Raises:
        RecipeError, TextError: names the option.
    """
    from transformers.integrations import integration_utils

    check_data(tuning.data, tuning.eval_data)
    check_device(tuning.device)
    pick_device(tuning.device)
    for name in report_to or []:
        if name not in REPORTERS:
            raise RecipeError(f"--report-to {name} is not one of {', '.join(REPORTERS)}")
        if not getattr(integration_utils, f"is_{name}_available")():
            raise RecipeError(f"--report-to {name} is not installed: pip install {name}")


def reporters(names: list[str] | None, folder: Path) -> list[TrainerCallback]:
    """Transformers' own callbacks for ``names``."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if "tensorboard" in (names or []):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
    return [INTEGRATION_TO_CALLBACK[name]() for name in names or []]

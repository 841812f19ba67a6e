"""The default method with other calibration text, windows and precisions; without one of its parts; and probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed.corpus import domains

BUDGET = 0.25
PARTED = (0.25, 0.125)
PROBED = 512  # tokens of the longest probe
TOKENS = (4096, 16384, 65536, 262144)
LONGER = (1, 2, 4)  # held-out windows, in calibration windows
CALIBRATION, PARTS, PROBE = "What calibration does", "What each part brings", "What is found again in the context"
WITHOUT: dict[str, dict[str, Any]] = {
    "no gradient steps": {"reconstruction_steps": 0},
    "no expected rotation": {"expected_rotation": False},
    "rope channels of RoRoPE (TransMLA)": {"rope": "rorope"},
    "latent by balanced PCA (TransMLA), no refit, no steps": {"factorization": "balanced-pca"},
    "latent by whitening (SVD-LLM), no refit, no steps": {"factorization": "whitened"},
}

Case = tuple[dict[str, Any], Any, dict[str, Any]]


def cases(protocol: Any, context: int, budgets: Sequence[float]) -> list[Case]:
    """(what names a row, its protocol, settings on top of the method's); ``context`` is the longest window there is."""

    def case(name: str, changed: Any, group: str = CALIBRATION, budget: float = BUDGET, **settings: Any) -> Case:
        return {"group": group, "case": name, "method": "anymla", "budget": budget}, changed, settings

    found = [case(name, protocol, PARTS, budget, **less) for budget in PARTED for name, less in WITHOUT.items()]
    probed = replace(protocol, probe=min(PROBED, context))
    found += [case("probe", probed, PROBE, budget) for budget in budgets]
    found += [case(f"{count} calibration tokens", replace(protocol, calibration_tokens=count)) for count in TOKENS]
    longest = min(protocol.calibration_length, context // LONGER[-1])
    for length in (longest, longest // 2):
        for times in LONGER:
            changed = replace(protocol, calibration_length=length, length=length * times)
            found.append(case(f"windows of {length}, scored on {length * times}", changed))
    found += [case(f"in {dtype}", protocol, dtype=dtype) for dtype in ("float32", "bfloat16")]
    kinds = domains(map(Path, protocol.text))
    for fitted in kinds:
        for scored in kinds:
            changed = replace(protocol, domain=fitted, held_out_domain=scored)
            found.append(case(f"calibrated on {fitted}, scored on {scored}", changed))
    return found

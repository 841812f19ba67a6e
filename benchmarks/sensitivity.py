"""What calibration does to the default method: how much text, of which domain, in which windows, in which precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed.corpus import read_rows

BUDGET = 0.25
TOKENS = (4096, 16384, 65536, 262144)
LONGER = (1, 2, 4)  # held-out windows, in calibration windows

Case = tuple[dict[str, Any], Any, dict[str, Any]]


def cases(protocol: Any, context: int) -> list[Case]:
    """(what names a row, its protocol, settings on top of the method's); ``context`` is the longest window there is."""

    def case(name: str, changed: Any, **settings: Any) -> Case:
        return {"case": name, "method": "anymla", "budget": BUDGET}, changed, settings

    found = [case(f"{count} calibration tokens", replace(protocol, calibration_tokens=count)) for count in TOKENS]
    domains = sorted({domain for path in protocol.text for domain, _ in read_rows(Path(path))} - {""})
    for fitted in domains:
        for scored in domains:
            changed = replace(protocol, domain=fitted, held_out_domain=scored)
            found.append(case(f"calibrated on {fitted}, scored on {scored}", changed))
    short = min(protocol.calibration_length, context // LONGER[-1])
    for times in LONGER:
        changed = replace(protocol, calibration_length=short, length=short * times)
        found.append(case(f"windows of {short}, scored on {short * times}", changed))
    return [*found, *(case(f"in {dtype}", protocol, dtype=dtype) for dtype in ("float32", "bfloat16"))]

"""What ``anymla export`` did, for export.json and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.layouts import Target

if TYPE_CHECKING:
    from anymla.exports.parity import Parity

BYTES = {"q8_0": 34 / 32, "q4_0": 18 / 32, "fp8": 1}  # per number, scales included; 2 else


@dataclass(frozen=True, kw_only=True)
class Export:
    """The report of an export: its files, how far it equals the converted model, and the commands to serve it.

    ``bytes``: of all files but the model card and this report. ``dtype``, ``pad``: as written, defaults filled in.
    ``cache_type``: of the quantised cache that it is for, or None.
    ``original_numbers``: what the original caches per token and layer, beside parity's ``cached_numbers``.
    ``versions``: of what wrote and checked it.
    """

    output: Path
    target: Target
    pad: str
    cache_type: str | None
    parity: Parity
    original_numbers: float
    bytes: int
    seconds: float
    commands: dict[str, str]
    dtype: str
    versions: dict[str, str]
    anymla_version: str

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return vars(self) | {
            "output": str(self.output),
            "parity": self.parity.to_dict(),
            "cached_numbers": self.parity.cached_numbers,
        }

    @property
    def warning(self) -> str | None:
        """That the cache is no smaller than the original's, where it is not."""
        if self.parity.cached_numbers * BYTES.get(self.cache_type or "", 2) < self.original_numbers * 2:
            return None
        filled = (
            "" if self.pad == "none" else f"; --pad {self.pad} fills it up, --pad none does not (docs/exporting.md)"
        )
        return (
            f"the export caches {self.parity.cached_numbers:g} numbers per token and layer, the original "
            f"{self.original_numbers:g}: it saves no memory{filled}"
        )

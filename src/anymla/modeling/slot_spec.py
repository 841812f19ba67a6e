"""What a layer's cache holds, as slots of numbers per token.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Numbers of one kind that a layer caches per token.

    ``tokens``: the most tokens it holds; None where it holds all. ``once``: whether it holds some tokens beside another
    slot that holds all, so that its size is paid once and not per token. ``until``: tokens at which it is given up.
    ``codec``: how a number is stored: "plain" in the cache's dtype, "byte", "index" as an int64.
    """

    name: str
    width: int
    tokens: int | None = None
    once: bool = False
    until: int | None = None
    codec: str = "plain"

    def held(self, length: int) -> int:
        """Tokens that it holds once ``length`` tokens are read."""
        if self.until is not None and length >= self.until:
            return 0
        return length if self.tokens is None else min(length, self.tokens)


def exact_slots(width: int, exact_window: int) -> list[Slot]:
    """Keys and values, ``width`` numbers each, of the last tokens; none without an exact window."""
    if not exact_window:
        return []
    tokens = exact_window - 1  # the newest token's own are computed with its query
    return [Slot(name=name, width=width, tokens=tokens, once=True) for name in ("exact_keys", "exact_values")]

"""Dataclasses as config.json describes them, and what is wrong with such a description.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any


def names(kind: Any) -> list[str]:
    """The names of a dataclass's fields."""
    return [each.name for each in fields(kind)]


def checked(kind: Any, described: Any, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """``described`` as a dict that has every field that ``kind`` needs and none that it has not."""
    if not isinstance(described, Mapping):
        raise ValueError(f"{kind.__name__} must be an object, got {described!s:.40}")
    if unknown := described.keys() - {*names(kind)} | described.keys() & {*skipped}:
        raise ValueError(f"{kind.__name__} has no field {min(map(str, unknown)):.40}: written by a newer anymla?")
    needed = {each.name for each in fields(kind) if each.default is MISSING}
    if missing := needed - described.keys():
        raise ValueError(f"{kind.__name__} lacks {min(missing)}")
    return dict(described)


def shortened(spec: Any) -> dict[str, Any] | None:
    """The fields of ``spec`` that are not at their defaults."""
    if spec is None:
        return None
    changed = {each.name for each in fields(spec) if getattr(spec, each.name) != each.default}
    kept = {name: value for name, value in asdict(spec).items() if name in changed}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

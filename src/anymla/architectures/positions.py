"""Rotary positions as configs state them: the kind, the base, the part of a head that they turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymla.architectures.families import ROPE_TYPES, Family
from anymla.errors import UnsupportedModelError, shown
from anymla.modeling.spec import RopeSpec

MOST = 1e30  # of a base or factor


def read_rope(config: Mapping[str, Any]) -> RopeSpec:
    """The rope of a model; where types of layers have one each, the first one's.

    Raises:
        UnsupportedModelError: an unknown type, or a setting of the wrong kind; the message names it.
    """
    settings = _settings(config)
    if settings and all(value is None or isinstance(value, dict) for value in settings.values()):
        first, *_ = [_rope(each or {}, config) for each in settings.values()]  # None: no rope in layers of that type
        return first
    return _rope(settings, config)


def rope_pairs(config: Mapping[str, Any], family: Family, head_dim: int, kind: str | None) -> int:
    """Pairs of a head that rope turns in a layer of type ``kind``.

    Raises:
        UnsupportedModelError: not a part of a head that holds pairs.
    """
    if family.partial_rope is None:
        return head_dim // 2
    settings = _settings(config)
    own = settings.get(kind) if kind is not None else None
    settings = own if isinstance(own, dict) else settings
    places = (  # transformers 5 moves a family's own field into rope_parameters; some say a number of dims instead
        (settings, "partial_rotary_factor"),
        (settings, family.partial_rope),
        (config, family.partial_rope),
        (config, "rotary_dim"),
    )
    for fields, name in places:
        if (part := fields.get(name)) is not None:
            return _pairs(part, name, head_dim)
    return head_dim // 2


def _pairs(part: Any, name: str, head_dim: int) -> int:
    most = head_dim if name == "rotary_dim" else 1
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= most:
        raise UnsupportedModelError(f"config.json: {name} must be more than 0 and at most {most}, got {shown(part)}")
    turned = int(part if name == "rotary_dim" else head_dim * part)
    if turned < 2 or turned % 2:
        raise UnsupportedModelError(
            f"config.json: {name} {shown(part)} rotates {turned} of {head_dim} dims of a head: not a number of pairs"
        )
    return turned // 2


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (transformers 4)."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise UnsupportedModelError(f"config.json: rope settings must be an object, got {shown(settings)}")
    return settings


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any]) -> RopeSpec:
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type  # what Qwen2-VL called it: its tables are 3 in one
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise UnsupportedModelError(f"config.json: rope type {shown(rope_type)} is not one of {known}")
    theta = _positive(settings.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta")
    if (factor := settings.get("factor")) is not None:
        _positive(factor, "rope factor")
    rest = {key: value for key, value in settings.items() if key not in ("rope_type", "type", "rope_theta")}
    return RopeSpec(rope_type=rope_type, theta=theta, settings=rest)


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise UnsupportedModelError(f"config.json: {name} must be a positive number, got {shown(value)}")
    return float(value)

"""Sizes of a decoder layer that are not those of its model.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .described import checked, shortened


@dataclass(frozen=True, kw_only=True)
class WidthSpec:
    """What a narrower decoder layer has fewer of than its model's config says.

    Args:
        neurons, experts, heads: FFN neurons, experts, and KV heads; None: as many as the config says.
        layer: path of the decoder layer in the model.
        config: the same sizes as fields of config.json; empty as long as only that was read.
    """

    neurons: int | None = None
    experts: int | None = None
    heads: int | None = None
    layer: str = ""
    config: Mapping[str, int] = field(default_factory=dict)

    def config_of(self, config: Any) -> Any:
        """The ``config`` that the layer is made from: a copy with its own sizes."""
        made = copy.deepcopy(config)
        for name, size in self.config.items():
            setattr(made, name, size)
        return made

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return (shortened(self) or {}) | {"config": dict(self.config)}

    @classmethod
    def of(cls, described: Any) -> WidthSpec:
        """The sizes that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        found = cls(**checked(cls, described))
        named = found.config if isinstance(found.config, Mapping) else {"config": None}
        sizes = dict(named) | {name: size for name in NAMES if (size := getattr(found, name)) is not None}
        if wrong := [name for name, size in sizes.items() if type(size) is not int or size < 1]:
            raise ValueError(f"WidthSpec: {wrong[0]!s:.40} is no size")
        return found


NAMES = ("neurons", "experts", "heads")

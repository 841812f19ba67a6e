"""Which packed linear layers of a decoder layer have zero points.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .described import checked, shortened


@dataclass(frozen=True, kw_only=True)
class ZerosSpec:
    """The linears of one decoder layer that are ZeroedLinear (zeroed_linear.py).

    Args:
        group: inputs that share a zero point.
        layer: path of the decoder layer in the model.
        linears: paths of the linears in the layer; empty as long as only the config was read.
    """

    group: int
    layer: str = ""
    linears: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return shortened(self) or {}

    @classmethod
    def of(cls, described: Any) -> ZerosSpec:
        """The linears that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        fields = checked(cls, described)
        if type(fields["group"]) is not int or fields["group"] < 1:
            raise ValueError(f"ZerosSpec: group {fields['group']!s:.20} is no size")
        return cls(**fields | {"linears": tuple(fields.get("linears", ()))})

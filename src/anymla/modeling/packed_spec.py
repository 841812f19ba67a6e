"""Which linear layers of a decoder layer hold packed weights, and how many bytes these are.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .described import checked, shortened

SCALES, MEANS = 4, 3  # numbers of each row and block: sizes, and means beside them


@dataclass(frozen=True, kw_only=True)
class PackedSpec:
    """The packed linears of one decoder layer (packed_linear.py).

    Args:
        block_size: columns that share the scales of a row; a multiple of 8.
        means: whether there are means beside the sizes.
        attention: whether projections of its attention may be among the linears.
        layer: path of the decoder layer in the model.
        linears: numbers out of and into each, by its path in the layer; empty as long as only the config was read.
    """

    block_size: int
    means: bool = True
    attention: bool = True
    layer: str = ""
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many weights are packed."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def scales(self) -> int:
        """Numbers of a row and block."""
        return SCALES + MEANS * self.means

    def blocks(self, into: int) -> int:
        """Blocks of a row of ``into`` weights."""
        return -(-into // self.block_size)

    def size(self, width: int, below: str = "") -> int:
        """Bytes of all that stands for the packed weights: two planes of bits, which columns are salient, scales.

        ``width``: bytes of a scale. ``below``: count only linears whose path begins so.
        """
        shapes = [shape for name, shape in self.linears.items() if name.startswith(below)]
        return sum(
            (2 * out + 1) * -(-into // 8) + self.scales * out * self.blocks(into) * width for out, into in shapes
        )

    def dense_size(self, width: int, below: str = "") -> int:
        """Bytes that the same weights have in ``width`` bytes each."""
        return width * sum(out * into for name, (out, into) in self.linears.items() if name.startswith(below))

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return (shortened(self) or {}) | {"linears": {name: list(shape) for name, shape in self.linears.items()}}

    @classmethod
    def of(cls, described: Any) -> PackedSpec:
        """The packed linears that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        fields = checked(cls, described)
        linears = fields.get("linears", {})
        if not isinstance(linears, Mapping) or not all(map(_is_shape, linears.values())):
            raise ValueError("PackedSpec: linears must give two sizes for each path")
        found = cls(**fields | {"linears": {name: (shape[0], shape[1]) for name, shape in linears.items()}})
        if type(found.block_size) is not int or found.block_size < 8 or found.block_size % 8:
            raise ValueError(f"PackedSpec: block_size {found.block_size!s:.20} is no multiple of 8")
        return found


def _is_shape(shape: Any) -> bool:
    sized = isinstance(shape, list | tuple) and len(shape) == 2
    return sized and all(type(size) is int and size > 0 for size in shape)

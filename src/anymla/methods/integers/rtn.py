"""The method `rtn`: every weight goes to the nearest integer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.integers.step import IntegerWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from anymla.methods.integers.packed import Rounded
    from anymla.sweep.layer import Layer


class RTN(IntegerWeights):
    """Settings of rounding to the nearest integer, up to the largest weight of each group."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[Paper] = Paper(title="Rounding to nearest")
    summary: ClassVar[str] = "weights as integers, each rounded to the nearest; reads no text"

    def rounded(self, layer: Layer, linears: dict[str, nn.Linear]) -> dict[str, Rounded]:
        """Scales from the largest weight of each group."""
        from anymla.architectures.packed import packed_linears
        from anymla.methods.integers.packed import Rounded

        bits, found = packed_linears(layer.module, layer.planned), {}
        for name, linear in linears.items():
            weight = linear.weight.float()
            scale = largest_scale(weight, bits[name], self.group).to(layer.saved).float()
            found[name] = Rounded(weight=weight, scale=scale)
        return found


def largest_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    """Scales [out,in/group] of W [out,in] that reach the largest weight of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams

    from anymla.methods.integers.packed import weight_args

    groups = weight.unflatten(1, (-1, group))
    scale: Tensor = calculate_qparams(groups.amin(-1), groups.amax(-1), weight_args(bits, group))[0]
    return scale

"""The method `rtn`: every weight goes to the nearest integer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.integers.step import IntegerWeights

if TYPE_CHECKING:
    from torch import Tensor


class RTN(IntegerWeights):
    """Settings of rounding to the nearest integer, up to the largest weight of each group."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[Paper] = Paper(title="Rounding to nearest")
    summary: ClassVar[str] = "weights as integers, each rounded to the nearest; reads no text"

    def scale_of(self, weight: Tensor, bits: int) -> Tensor:
        """From the largest weight of each group."""
        return largest_scale(weight, bits, self.group)


def largest_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    """Scales [out,in/group] of W [out,in] that reach the largest weight of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams

    from anymla.methods.integers.packed import weight_args

    groups = weight.unflatten(1, (-1, group))
    scale: Tensor = calculate_qparams(groups.amin(-1), groups.amax(-1), weight_args(bits, group))[0]
    return scale

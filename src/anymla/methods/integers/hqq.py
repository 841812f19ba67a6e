"""The method `hqq`: scales by half-quadratic quantisation, through torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from anymla.methods.base import Paper
from anymla.methods.integers.step import IntegerWeights

if TYPE_CHECKING:
    from torch import Tensor


class HQQ(IntegerWeights):
    """Settings of integers whose scales are solved for such that few weights are far off; it reads no text.

    Deviations from HQQ: integers are symmetric and only the scale is solved for, which torchao calls
    ``hqq_scale_only``. HQQ's own zeros are no integers, and no format that transformers 5 loads holds these: its loader
    of HQQ's format is not written yet. Rounded zeros would lose what HQQ gains. A weight costs no zeros instead.
    """

    name: ClassVar[str] = "hqq"
    paper: ClassVar[Paper] = Paper(title="Half-Quadratic Quantization (mobiusml.github.io/hqq_blog)")
    summary: ClassVar[str] = "weights as integers, scales by half-quadratic quantisation; reads no text"
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors", "torchao")

    def scale_of(self, weight: Tensor, bits: int) -> Tensor:
        """By torchao's solver."""
        return solved_scale(weight, bits, self.group)


def solved_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    """Scales [out,in/group] of W [out,in] by half-quadratic quantisation."""
    import torch
    from torch import nn
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(
        holder,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group),
            intx_choose_qparams_algorithm="hqq_scale_only",
        ),
    )
    packed: Any = holder.weight
    scale: Tensor = packed.scale
    return scale

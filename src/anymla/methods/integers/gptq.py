"""The method `gptq`: weights that are not rounded yet make up for those that are, through llm-compressor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from anymla.methods.base import LayerMethod, Paper
from anymla.methods.integers.step import IntegerWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from anymla.methods.integers.packed import Rounded
    from anymla.sweep.layer import Layer


class GPTQ(IntegerWeights, LayerMethod):
    """Settings of GPTQ: columns are rounded one after the other, and the error goes to those that are left.

    Deviations from the paper: scales are chosen for the groups before anything is rounded, by default those of the step
    hqq. Columns go by falling activation (``actorder: static``), so that the checkpoint needs no order of columns. Both
    are llm-compressor's way. Integers are symmetric, as transformers loads them. All linear layers of a decoder layer
    see what the layer computes before any of them is rounded. The layers below are rounded already.
    """

    name: ClassVar[str] = "gptq"
    paper: ClassVar[Paper] = Paper(title="GPTQ", arxiv="2210.17323")
    summary: ClassVar[str] = "weights as integers, errors made up for on calibration text"
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors", "torchao", "llmcompressor")
    extra: ClassVar[str] = "gptq"

    damping: float = Field(
        0.01, gt=0, lt=1, description="Share of the mean that is added to the diagonal of the Hessian."
    )
    scales: Literal["largest", "hqq"] = Field(
        "hqq", description="Scales of the groups: those that reach the largest weight, or the step hqq's."
    )

    def scale_of(self, weight: Tensor, bits: int) -> Tensor:
        """As one of the other steps has it."""
        from anymla.methods.integers.hqq import solved_scale
        from anymla.methods.integers.rtn import largest_scale

        return (solved_scale if self.scales == "hqq" else largest_scale)(weight, bits, self.group)

    def rounded(self, layer: Layer, linears: dict[str, nn.Linear], bits: dict[str, int]) -> dict[str, Rounded]:
        """Rounds every weight by the Hessian of its inputs; one that no token reaches stays for the nearest integer."""
        from anymla.model_run.hessians import Hessians

        hessians, found = Hessians(linears), super().rounded(layer, linears, bits)
        hessians.gather(layer)
        for name, given in found.items():
            if (hessian := hessians.of(name)) is not None:
                made = compensated(given.weight, hessian.float(), given.scale, bits=bits[name], damping=self.damping)
                found[name] = replace(given, weight=made)
        return found


def compensated(weight: Tensor, hessian: Tensor, scale: Tensor, *, bits: int, damping: float) -> Tensor:
    """W [out,in] as multiples of its scales [out,in/group], by llm-compressor.

    ``hessian``: the sum of x x^T [in,in], up to a factor.
    """
    import torch
    from loguru import logger

    from anymla.methods.integers.packed import weight_args

    logger.disable("llmcompressor")  # it warns of CPUs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = weight_args(bits, weight.shape[1] // scale.shape[1]).model_copy(update={"actorder": "static"})
    given = weight[None].clone(), hessian[None].clone(), scale[None], torch.zeros_like(scale)[None], None
    with torch.no_grad():
        made: Tensor = quantize_weight(*given, args, percdamp=damping)[0]
    return made[0]

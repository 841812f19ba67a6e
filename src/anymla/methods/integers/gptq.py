"""The method `gptq`: weights that are not rounded yet make up for those that are, through llm-compressor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    hqq. Columns go by falling activation (``actorder: static``), so that the checkpoint needs no order of columns.
    llm-compressor does both. Integers are symmetric, as transformers loads them. All linear layers of a decoder layer
    see what the layer computes before any of them is rounded; the layers below are rounded already.
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

    def rounded(self, layer: Layer, linears: dict[str, nn.Linear]) -> dict[str, Rounded]:
        """Rounds every weight by the Hessian of its inputs."""
        from anymla.architectures.packed import packed_linears
        from anymla.methods.integers.hqq import solved_scale
        from anymla.methods.integers.packed import Rounded
        from anymla.methods.integers.rtn import largest_scale

        scale_of = solved_scale if self.scales == "hqq" else largest_scale
        bits, hessians, found = packed_linears(layer.module, layer.planned), input_hessians(layer, linears), {}
        for name, linear in linears.items():
            weight = linear.weight.float()
            scale = scale_of(weight, bits[name], self.group).to(layer.saved).float()
            made = compensated(weight, hessians[name], scale, bits=bits[name], damping=self.damping)
            found[name] = Rounded(weight=made, scale=scale)
        return found


def compensated(weight: Tensor, hessian: Tensor, scale: Tensor, *, bits: int, damping: float) -> Tensor:
    """W [out,in] as multiples of its scales [out,in/group], by llm-compressor; ``hessian``: mean x x^T [in,in]."""
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


def input_hessians(layer: Layer, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Mean x x^T [in,in], over all processes, of what each linear layer is given in the new model's stream."""
    from anymla.distributed import all_sum, all_sum_number
    from anymla.model_run.stream import run_layer

    sums: dict[str, Tensor] = {}
    with _listening(linears, sums):
        for _ in run_layer(layer.module, None, layer.converted, layer.arguments, layer.batch):
            pass
    tokens = all_sum_number(layer.converted.shape[0] * layer.converted.shape[1])
    return {name: all_sum(found.clone()) / tokens for name, found in sums.items()}


@contextmanager
def _listening(linears: dict[str, nn.Linear], sums: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, x^T x of each linear layer's inputs is added up in ``sums``; once where several share them."""
    made: dict[str, Any] = {}  # the last input, and its product

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if made.get("input") is not args[0]:
                rows = args[0].flatten(0, -2).float()
                made["input"], made["product"] = args[0], rows.T @ rows
            sums[name] = made["product"] + sums[name] if name in sums else made["product"]

        return hook

    hooks = [linear.register_forward_pre_hook(listen(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Linear layers as compressed-tensors packs them.

Shapes: W [out,in], scales [out,in/group].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight [out,in] that is rounded, or is to be, to multiples of its scales [out,in/group].

    ``zero`` [out,in/group]: what was taken off the weight before; None for nothing.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None


def weight_args(bits: int, group: int) -> QuantizationArgs:
    """compressed-tensors' description of such a weight."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)


class IntegerLinear(nn.Module):
    """A linear layer whose weight lies packed as it will in the checkpoint; it is unpacked whenever it runs."""

    def __init__(self, packed: dict[str, Tensor], bias: Tensor | None, scheme: Any) -> None:
        super().__init__()
        self.scheme, self.dtype = scheme, packed["weight_scale"].dtype
        self.out_features, self.in_features = (int(size) for size in packed["weight_shape"])
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, rounded: Rounded, linear: nn.Linear, *, bits: int, group: int) -> IntegerLinear:
        """Rounds and packs ``rounded``, in the place of ``linear``."""
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=weight_args(bits, group))
        parts = {"weight": rounded.weight, "weight_scale": rounded.scale}
        packed = PackedQuantizationCompressor.compress(parts, scheme)
        packed["weight_scale"] = rounded.scale.to(linear.weight.dtype)
        return cls(packed, linear.bias, scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        """As a linear layer."""
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

        parts = {name: tensor for name, tensor in self.named_buffers() if tensor is not None}
        weight = PackedQuantizationCompressor.decompress(parts, self.scheme)["weight"]
        return nn.functional.linear(inputs, weight.to(inputs.dtype), self.bias)

    def packed_bytes(self, number: int) -> int:
        """Bytes of the weight in the checkpoint; ``number``: bytes of a scale there."""
        return sum(
            tensor.numel() * (number if tensor.is_floating_point() else tensor.itemsize) for tensor in self.buffers()
        )

"""A linear layer whose weights are two bits each, with scales per row and block of columns.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

Every weight has a sign and a second bit. In a salient column, which all rows have in common, the second bit is the sign
of what the first one leaves: mean ± size ± size. In the others it chooses one of two groups, each with its own mean and
size: mean ± size. So a row has two sets of four levels in each block.

Shapes: O numbers out, I numbers in, b columns of a block, n blocks, c rows of a chunk, S scales of a row and block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .packed_spec import PackedSpec

CHUNK = 1 << 19  # weights that are unpacked at once
SECOND, SALIENT = 2, 4  # what the second bit, and a salient column, add to the number of a level


class PackedLinear(nn.Module):
    """Multiplies by weights that it unpacks a few rows at a time, and forgets.

    Weights are unpacked in float32, or finer where the input is, and rounded to the input's dtype.

    Args:
        spec: the size of a block, and whether scales have means.
        out_features, in_features: O and I.
        bias: whether there is one.
    """

    signs: Tensor
    second: Tensor
    salient: Tensor

    def __init__(self, spec: PackedSpec, out_features: int, in_features: int, *, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features, self.block_size = out_features, in_features, spec.block_size
        bits, blocks = -(-in_features // 8), spec.blocks(in_features)
        self.register_buffer("signs", torch.zeros(out_features, bits, dtype=torch.uint8))
        self.register_buffer("second", torch.zeros(out_features, bits, dtype=torch.uint8))
        self.register_buffer("salient", torch.zeros(bits, dtype=torch.uint8))
        self.scales = nn.Parameter(torch.zeros(spec.scales, out_features, blocks))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def weight(self) -> Tensor:
        """All weights [O,I], unpacked anew each time."""
        return self.unpacked(slice(None)).to(self.scales.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..,I] times the weights, plus the bias: [..,O]."""
        rows = max(1, CHUNK // self.in_features)
        chunks = [slice(start, start + rows) for start in range(0, self.out_features, rows)]
        made = [linear(inputs, self.unpacked(chunk, inputs.dtype).to(inputs.dtype)) for chunk in chunks]
        outputs = torch.cat(made, dim=-1)
        return outputs if self.bias is None else outputs + self.bias

    def unpacked(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [c,I] of some rows, in ``dtype``, that of the scales or float32, whichever is finest."""
        dtype = torch.promote_types(torch.promote_types(dtype, self.scales.dtype), torch.float32)
        codes = self._bits(self.signs[rows]) + SECOND * self._bits(self.second[rows])
        codes = codes + SALIENT * self._bits(self.salient)
        levels = levels_of(self.scales[:, rows].to(dtype))
        return levels.gather(-1, codes.long()).flatten(1)[:, : self.in_features]

    def _bits(self, planes: Tensor) -> Tensor:
        """The bits [..,n,b] of packed rows [..,I/8]."""
        packed = pad(planes, (0, self.scales.shape[-1] * self.block_size // 8 - planes.shape[-1]))
        return unpack_bits(packed).unflatten(-1, (-1, self.block_size))

    def extra_repr(self) -> str:
        """Sizes, as torch.nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}"


def levels_of(scales: Tensor) -> Tensor:
    """The eight levels [..,8] of each row and block, by sign, second bit and salient column; scales [S,..].

    Scales are the sizes of the concentrated group, of the sparse one, and of the first and the second order of salient
    columns; then, where there are any, the means of both groups and of salient columns.
    """
    concentrated, sparse, first, later, *means = scales
    near, far, salient = means or (torch.zeros_like(first),) * 3
    return torch.stack(
        [
            *(near - concentrated, near + concentrated, far - sparse, far + sparse),
            *(salient - first - later, salient + first - later, salient - first + later, salient + first + later),
        ],
        dim=-1,
    )


def pack_bits(bits: Tensor) -> Tensor:
    """Bits [..,I] in bytes [..,I/8], the first in the lowest place; the last byte is filled with zeros."""
    filled = pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (filled << _places(bits)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """The bits [..,8 n] of bytes [..,n], as uint8."""
    return ((packed.unsqueeze(-1) >> _places(packed)) & 1).flatten(-2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)

"""A linear layer of packed integers whose groups of inputs have a zero point of any value.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

A weight of row o and group g is ``scale[o,g] * code + zero[o,g]``. The zero is a weight of its own on the sum of the
group's inputs. So a low-rank adapter of ``zeros`` merges into it (QA-LoRA, arXiv 2309.14717, section 3.3).

Shapes: O numbers out, I numbers in, b inputs of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ZeroedLinear(nn.Module):
    """Multiplies by codes, and adds the zeros' part.

    Args:
        codes: the linear layer of the codes and their scales, [O,I]; it has the bias.
        zeros: [O,I/b], a linear layer without bias.
    """

    def __init__(self, codes: nn.Module, zeros: nn.Linear) -> None:
        super().__init__()
        self.codes, self.zeros = codes, zeros
        self.in_features, self.out_features = int(codes.in_features), zeros.out_features  # type: ignore[arg-type]
        self.group = self.in_features // zeros.in_features

    @classmethod
    def of(cls, codes: nn.Module, zeros: Tensor) -> ZeroedLinear:
        """``codes`` with ``zeros`` [O,I/b]."""
        made = nn.Linear(zeros.shape[1], zeros.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(zeros, requires_grad=False)
        return cls(codes, made)

    @classmethod
    def over(cls, linear: Any, group: int) -> ZeroedLinear:
        """``linear`` with zeros that are zero."""
        return cls.of(linear, linear.weight.new_zeros(linear.out_features, linear.in_features // group))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..,I] times the weights, plus the bias: [..,O]."""
        made: Tensor = self.codes(inputs) + self.zeros(inputs.unflatten(-1, (-1, self.group)).sum(-1))
        return made


def middles(weight: Tensor, group: int) -> Tensor:
    """The middle [O,I/b] between the least and the largest weight [O,I] of every group."""
    groups = weight.unflatten(1, (-1, group))
    return torch.lerp(groups.amin(-1), groups.amax(-1), 0.5)

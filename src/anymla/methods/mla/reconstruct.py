"""Layer-wise reconstruction: gradient steps on a converted attention (docs/mathematics.md, 'The reconstruction').

Shapes: N windows of T tokens, D hidden. No labels and no other layer take part. The attention learns the target of the
refit: what the original attention adds to the residual stream, plus what the layers below have lost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anymla.distributed import all_sum, all_sum_number, rank, world
from anymla.io.telling import told
from anymla.methods.mla.costs import STEP_TOKENS
from anymla.model_run.activations import Activations
from anymla.model_run.stream import first

STEP_SIZE = 0.4  # over the root of the hidden size: the highest rate, as a share of a tensor's own size
WARMUP, CHECKS, BETWEEN = 20, 4, 10  # steps until the full rate, at most; looks at the choice windows; least between
NOTHING_LOST = 1e-9  # share of the target's power below which a layer is as the original's
LEARNED_BUFFERS = ("query_rotation", "channel_weight")


class Reconstruction:
    """Adam on ``attention``'s tensors, in at least float32, against ``target`` [N,T,D] of ``inputs`` [N,T,D].

    ``arguments``: what else the attention is called with; ``batch``: windows that fit into memory at once; ``saved``:
    the dtype that the result is rounded to. Of several processes each has every n-th window; all take the same steps.
    """

    def __init__(
        self,
        attention: Any,
        inputs: Activations,
        target: Activations,
        arguments: dict[str, Any],
        batch: int,
        saved: torch.dtype,
    ) -> None:
        self.inputs, self.target, self.batch, self.saved = inputs, target, batch, saved
        like = next(attention.parameters())
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.arguments = {name: _cast(value, self.dtype) for name, value in arguments.items()}
        self.trained = copy.deepcopy(attention).to(self.dtype)
        self.tensors, self.kept = _learned(self.trained), _learned(attention)

    def run(self, steps: int, fit: slice, choice: slice, seed: int) -> None:
        """Takes ``steps`` steps on the windows ``fit``; what did best on ``choice`` goes into the attention."""
        least, power = self._error(choice), self._power(choice)
        if least <= NOTHING_LOST * power:
            return
        groups = [{"params": [each.requires_grad_(True)], "size": _size(each)} for each in self.tensors.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        every = max(BETWEEN, -(-steps // CHECKS))
        for step, windows in zip(told(range(steps), "gradient step"), self._batches(fit, seed), strict=False):
            rate = _rate(step, steps, self.inputs.shape[2])
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"]
            optimizer.zero_grad(set_to_none=False)
            self._add_gradients(windows)
            optimizer.step()
            if step + 1 in (*range(every, steps, every), steps) and (error := self._error(choice)) < least:
                least = error
                self._keep()

    def _batches(self, fit: slice, seed: int) -> Iterator[list[int]]:
        """This process's part of each step's windows, which are drawn from those of all processes."""
        total = int(all_sum_number(fit.stop - fit.start, self.inputs.device))
        size = min(total, max(1, STEP_TOKENS // self.inputs.shape[1]))
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while True:
            if len(order) < size:
                order = torch.randperm(total, generator=generator).tolist()
            drawn, order = order[:size], order[size:]
            yield [fit.start + window // world() for window in drawn if window % world() == rank()]

    def _add_gradients(self, windows: list[int]) -> None:
        with torch.enable_grad():
            for start in range(0, len(windows), self.batch):
                self._loss(windows[start : start + self.batch]).backward()
        for tensor in self.tensors.values():
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            all_sum(tensor.grad)

    def _loss(self, windows: list[int]) -> Tensor:
        inputs, target = (
            torch.cat([room[window : window + 1] for window in windows]).to(self.dtype)
            for room in (self.inputs, self.target)
        )
        return (first(self.trained(inputs, **self.arguments)) - target).square().sum()

    @torch.no_grad()
    def _error(self, windows: slice) -> float:
        starts = range(windows.start, windows.stop, self.batch)
        parts = (list(range(start, min(start + self.batch, windows.stop))) for start in starts)
        error = float(sum(self._loss(part).double() for part in parts))
        return all_sum_number(error if math.isfinite(error) else math.inf, self.inputs.device)

    def _power(self, windows: slice) -> float:
        power = float(sum(part.double().square().sum() for part in self.target.split(self.batch, windows)))
        return all_sum_number(power, self.inputs.device)

    def _keep(self) -> None:
        """Casts the tensors as they are now into the attention."""
        for name, tensor in self.tensors.items():
            self.kept[name].data.copy_(tensor.detach().to(self.saved))


def _learned(attention: Any) -> dict[str, Tensor]:
    """The tensors that steps move."""
    named = dict(attention.named_parameters()) | {
        name: buffer for name, buffer in attention.named_buffers() if name in LEARNED_BUFFERS
    }
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


def _rate(step: int, steps: int, width: int) -> float:
    """Share of a tensor's size that it moves in ``step``: warmed up, then a cosine to zero."""
    warmed = min(1.0, (step + 1) / min(WARMUP, steps / 4))
    return STEP_SIZE / math.sqrt(width) * warmed * (1 + math.cos(math.pi * step / steps)) / 2


def _size(tensor: Tensor) -> float:
    """Root mean square of a tensor; of one that is zero, a small one."""
    return max(tensor.detach().double().square().mean().sqrt().item(), 1e-3)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``value`` as ``dtype``."""
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

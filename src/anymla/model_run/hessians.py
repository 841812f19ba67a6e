"""Hessians of the inputs of linear layers, by which weights make up for errors of others (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anymla.distributed import all_sum
from anymla.model_run.maps import with_maps

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class Hessians:
    """Second moments of the inputs of linears; those that get the same tensor have one together."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self.linears, self.owner = linears, dict[str, str]()
        self.grams: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}  # in the batch that runs
        self.total: set[str] = set()

    def gather(self, layer: Layer) -> None:
        """Runs the layer as it is over what the packed layers below give, without the windows that are held out."""
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._listen(name, args[0]))
            for name, module in self.linears.items()
        ]
        windows = slice(0, layer.windows.choice.stop)
        try:
            for start, hidden in enumerate(layer.converted.split(layer.batch, windows)):
                place = slice(start * layer.batch, start * layer.batch + len(hidden))
                layer.module(hidden, **with_maps(layer.module, layer.converted, place, layer.arguments))
                self.seen.clear()
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, name: str) -> Tensor | None:
        """The Hessian [I,I] of a linear, over all processes, up to a factor; None where no token came to it."""
        if (owner := self.owner.get(name)) is None:
            return None
        if owner not in self.total:
            self.total.add(owner)
            all_sum(self.grams[owner])
        return self.grams[owner]

    def _listen(self, name: str, inputs: Tensor) -> None:
        self.owner[name] = owner = next((other for other, seen in self.seen.items() if seen is inputs), name)
        if owner != name:
            return
        self.seen[name] = inputs
        rows = inputs.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gram = (rows.T @ rows).double()  # of one batch; what is damped by a hundredth needs no finer products
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram

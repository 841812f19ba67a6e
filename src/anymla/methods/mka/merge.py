"""One layer out of several: the weighted sum of their weights, what stands before projections folded into them.

Shapes: D hidden; a projection's weight [..,D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.errors import UnsupportedModelError

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

Shares = tuple[tuple[int, float], ...]  # layers by their numbers, and the share of each; all together are 1


def merge(layer: Layer, shares: Shares) -> None:
    """Gives ``layer.module`` the sum of the layers' weights by their shares; it may be one of them.

    A projection that reads a normalised state is averaged together with the norm's gain, as W diag(gain). The sum is
    then divided by the gain of the layer itself, so that equal layers merge into the same weights, to the last bit.
    """
    own: dict[str, Tensor] = layer.module.state_dict()
    gains = {reader: f"{norm}.weight" for norm, readers in norm_readers(layer).items() for reader in readers}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in own.items()}
    divisors = {name: own[name].double() for name in gains.values()}
    divisors = {name: torch.where(gain == 0, 1, gain) for name, gain in divisors.items()}
    for index, share in shares:
        weights = own if index == layer.index else layer.weights_of(index)
        for name, total in sums.items():
            if (gain := gains.get(name)) is not None:
                total += share * weights[name].double() * (weights[gain].double() / divisors[gain])
            elif name not in divisors:
                total += share * weights[name].double()
    made = {name: total.to(layer.dtypes[name]).to(own[name].dtype) for name, total in (sums | divisors).items()}
    layer.module.load_state_dict(made, assign=True)


def norm_readers(layer: Layer) -> dict[str, list[str]]:
    """The weights that multiply what each norm of the layer gives, found while a window runs.

    Raises:
        UnsupportedModelError: something else reads it.
    """
    seen: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}

    def normalised(name: str, output: Tensor) -> None:
        seen.append((name, output))
        readers[name] = []

    def read(name: str, given: Any) -> None:
        for norm, output in seen:
            if given is output:
                readers[norm].append(f"{name}.weight")

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: normalised(name, output))
        for name, module in layer.module.named_children()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0]))
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        layer.module(layer.converted[:1], **layer.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    if not readers or not all(readers.values()):
        raise UnsupportedModelError(f"{type(layer.module).__name__}: what reads its norms is no projection of theirs")
    return readers

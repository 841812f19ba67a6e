"""The matrix that a linear module stands for: absorbed attention needs it as it is, not a product with it.

One of the modelling files that travel with every converted checkpoint; it needs torch only. The weight of a module may
be quantised, on another device until a hook fetches it, or have an adapter beside it. All of them know how to multiply,
so the module is asked for its products with the unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SETTINGS = (bool, int, float, str, tuple, list, dict, set)  # types of attributes that adapters are steered by
_KEPT = "_dense_weight"  # where a module keeps its matrix and the state that the matrix is of
_REPLACED = {"forward", "_hf_hook"}  # attributes of a module that something else was put around
_EVERY_MODULE = {*vars(nn.Module()), _KEPT} - {"training"}


def dense_weight(module: nn.Module, size: int, like: Tensor) -> Tensor | None:
    """The weight [out,size] of a linear ``module``, adapters and quantisation included, in the dtype of ``like``.

    None where the module adds a constant: then no matrix does what it does. What products gave is kept until the
    module's parameters or settings change; never while gradients flow or where hooks are at work.
    """
    if is_plain(module) and module.weight.device == like.device:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight
    found = _kept_products(module, size, like)
    return None if found.adds else found.weight


def affine_map(module: nn.Module, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [out,size] and the constant [out] of a linear ``module``, as ``dense_weight`` has the first."""
    bias = module._parameters["bias"] if _is_visible(module) else None
    if bias is not None and bias.device == like.device:
        return module.weight, bias  # type: ignore[return-value]
    found = _kept_products(module, size, like)
    return found.weight, found.constant


def is_plain(module: nn.Module) -> bool:
    """Whether the module is a linear layer without a bias whose weight is what it looks like."""
    return _is_visible(module) and module._parameters.get("bias") is None


def _is_visible(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or _hooked(module):
        return False
    weight: Any = module.weight
    kind = type(weight)
    traced = torch.compiler.is_compiling() and not is_traceable_wrapper_subclass(weight)  # a stand-in without numbers
    return weight.is_floating_point() and (kind in (nn.Parameter, Tensor) or traced)


def _hooked(module: nn.Module) -> bool:
    """Whether something else acts when the module, or a part of it, is called."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or (vars(part).keys() & _REPLACED and not _only_moves(part))
        for part in module.modules()
    )


def _only_moves(module: nn.Module) -> bool:
    """Whether accelerate only brings the input to the weights: a model over several devices, all of it in place."""
    hook: Any = vars(module).get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


@dataclass(frozen=True)
class _Products:
    """Weight [out,size] and constant [out] of a module."""

    weight: Tensor
    constant: Tensor

    @cached_property
    def adds(self) -> bool:
        """Whether the constant is more than zero: the CPU waits for a GPU, and so it asks once."""
        return bool(self.constant.any())


def _kept_products(module: nn.Module, size: int, like: Tensor) -> _Products:
    if _hooked(module) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _products(module, size, like)
    state = (like.dtype, like.device, _state(module))
    kept = module.__dict__.get(_KEPT)
    if kept is None or kept[0] != state:
        kept = (state, _products(module, size, like))
        module.__dict__[_KEPT] = kept
    found: _Products = kept[1]
    return found


def _products(module: nn.Module, size: int, like: Tensor) -> _Products:
    """The products of the module with all unit vectors, and what it makes of zero, which they are without."""
    unit = torch.eye(size + 1, size, dtype=like.dtype, device=like.device)  # the last row is zero
    products: Tensor = module(unit[None])[0].to(like)
    return _Products((products[:-1] - products[-1]).mT, products[-1])


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What changes when the module does: which tensors it has, how often they were written to, its settings."""
    tensors = [(id(t), t.data_ptr(), t._version) for t in (*module.parameters(), *module.buffers())]
    settings = [
        (name, key, repr(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if key not in _EVERY_MODULE and isinstance(value, _SETTINGS)
    ]
    return tuple(tensors), tuple(settings)

"""Lets a float64 model compute in float64 throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TABLES = (torch.Tensor.cos, torch.Tensor.sin, torch.cos, torch.sin, torch.log, torch.log1p, torch.polar)

PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128)


class Exact(TorchFunctionMode):
    """Families compute norms, softmax or rope tables in float32 whatever the model's dtype; this lifts those casts.

    What remains between original and converted model is then the algebra, and not how float32 rounds.
    """

    def __enter__(self) -> Any:
        self._dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if _is_double(first):
            if func is torch.Tensor.float:
                return first
            if func is torch.nn.functional.linear and args[1].dtype is torch.float32:  # a router kept in float32
                args = (first, args[1].double(), *args[2:])
            if func in PRODUCTS and args[1].dtype is torch.float32:
                args = (first, args[1].double(), *args[2:])
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        elif func in TABLES and first.dtype is torch.float32:
            args = tuple(value.double() if isinstance(value, torch.Tensor) else value for value in args)
        elif func in PRODUCTS and len(args) > 1 and _is_double(args[1]):  # made in float32 for numbers cast to it
            args = (first.double(), *args[1:])
        return func(*args, **kwargs)

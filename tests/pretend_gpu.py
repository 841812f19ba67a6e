"""A GPU that is not there: a device by the name of pretend, whose numbers lie in main memory.

A tensor on it is of the class Held. It is a CPU tensor whose device says pretend:0 or pretend:1. The mode ``Pretend``
runs every operation on the numbers. It refuses tensors of two devices in one operation, as CUDA does. It counts copies
between devices, and how often the CPU would have waited for the GPU.

The device is torch's own room for a new backend. It stays in the process, and so the tests run in one of their own
(pretend_runs.py). What it cannot show is the order of kernels that run on their own, and how fast they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import anymla

NAME = "pretend"
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITS = {  # the CPU must know their result, or how many numbers it has
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
}

ASKED_BY = (f"{Path(anymla.__file__).parent}/", "/transformers/", "/accelerate/")  # whose line it is


class _Backend:
    """What torch asks of a backend."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count, current_device = staticmethod(lambda: 2), staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, _Backend())


class Held(Tensor):
    """A tensor on the device ``held_on``."""

    held_on: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor, where: torch.device) -> Held:
        numbers = numbers.resolve_conj().resolve_neg()  # an alias would forget what is still to be done
        made = Tensor._make_subclass(cls, numbers, False, dispatch_device=True, device_for_backend_keys=where)
        made.held_on = where
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].held_on
        raise RuntimeError(f"{func} on a pretended GPU outside of its mode")

    def __repr__(self) -> str:
        return f"Held({tuple(self.shape)}, {self.dtype}, {self.held_on})"

    def __deepcopy__(self, memo: Any) -> Any:
        made: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), made)

    def tolist(self) -> Any:
        return self.cpu().tolist()


def numbers(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory."""
    if not isinstance(tensor, Held):
        return tensor
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Pretend(TorchDispatchMode):
    """Within the block, the device is there; ``copies`` and ``waits`` count by operation and by line of anymla."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def forget(self) -> None:
        """Begins to count anew."""
        self.copies.clear()
        self.waits.clear()

    def __enter__(self) -> Pretend:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=...) then copies in an operation of its own
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].held_on
        if func.overloadpacket is aten._fused_sdp_choice:
            return 0  # the plain one: all others are kernels of some device
        if torch.Tag.inplace_view in func.tags:  # changes no number
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not any(isinstance(each, Held) for each in tensors) and (asked is None or asked.type != NAME):
            return func(*args, **kwargs)
        target = self._target(func, args, tensors, asked)
        if asked is not None and asked.type == NAME:
            kwargs["device"] = CPU
        found = func(*tree_map_only(Tensor, numbers, args), **tree_map_only(Tensor, numbers, kwargs))
        if func._schema.is_mutable and func._schema.returns:
            return _written(func, args, kwargs, found)
        return tree_map_only(Tensor, lambda each: Held(each, target), found) if target.type == NAME else found

    def _target(self, func: Any, args: Any, tensors: list[Tensor], asked: torch.device | None) -> torch.device:
        """Where the result lies; counts what the operation costs, and refuses what CUDA refuses."""
        packet = func.overloadpacket
        if asked is not None and asked.type == NAME and asked.index is None:
            asked = torch.device(NAME, 0)
        if packet in COPIES:
            where = asked or args[0].device
            if {each.device for each in tensors} != {where}:
                self._count(self.copies, packet)
            return where
        if asked is not None:  # new numbers
            return asked
        where = next(each.device for each in tensors if isinstance(each, Held))
        strangers = [each for each in tensors if each.device != where and (each.dim() or isinstance(each, Held))]
        if packet in INDEXED:
            index = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in index):
                self._count(self.waits, packet)
            if any(each.device == CPU for each in index):  # CUDA copies it
                self._count(self.copies, packet)
            strangers = [each for each in strangers if not any(each is one for one in index)]
        if strangers:
            raise RuntimeError(f"{packet}: expected all tensors on {where}, found one on {strangers[0].device}")
        if packet in WAITS and func._overloadname != "self_int":
            self._count(self.waits, packet)
        return where

    @staticmethod
    def _count(counter: Counter[str], packet: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not any(name in frame.f_code.co_filename for name in ASKED_BY):
            frame = frame.f_back
        file = "" if frame is None else frame.f_code.co_filename
        counter[f"{packet}{f' at {Path(file).name}:{frame.f_lineno}' if ASKED_BY[0] in file else ''}"] += 1


def _written(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
    """What an operation returns that writes into its arguments: these arguments themselves."""
    schema = func._schema
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
    written = [given[each.name] for each in schema.arguments if each.alias_info and each.alias_info.is_write]
    if len(schema.returns) == 1:
        return written[0]
    return tuple(written[: len(found)])

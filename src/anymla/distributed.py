"""Several processes, each with its part of the calibration windows; alone, every call is the identity."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join_processes(device: str) -> str:
    """Joins the processes that torchrun started, if it did; returns the device of this one.

    The group lives as long as the process: a second one under the same launch would find the first one's addresses.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(_leave)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in place."""
    if world() > 1:
        dist.all_reduce(torch.view_as_real(values) if values.is_complex() else values)
    return values


def all_sum_number(value: float, device: Any = "cpu") -> float:
    """The sum of a number over all processes."""
    return all_sum(torch.tensor(value, dtype=torch.float64, device=device)).item() if world() > 1 else value


def all_rows(rows: Tensor) -> Tensor:
    """The ``rows`` [N,..] of all processes, one process's after the other's."""
    if world() == 1:
        return rows
    counts = torch.zeros(world(), dtype=torch.long, device=rows.device)
    counts[rank()] = len(rows)
    before, total = all_sum(counts)[: rank()].sum(), int(counts.sum())
    together = rows.new_zeros(total, *rows.shape[1:])
    together[before : before + len(rows)] = rows
    return all_sum(together)


def from_first(values: Tensor) -> Tensor:
    """The first process's ``values``, in place."""
    if world() > 1:
        dist.broadcast(values, src=0)
    return values


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if world() > 1:
        dist.barrier()


def first_decides(value: Any) -> Any:
    """The first process's ``value``, any picklable object."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]

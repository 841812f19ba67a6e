"""When attention over a latent runs in the Triton kernel of triton_decode.py and not in torch, its reference.

One of the modelling files that travel with every converted checkpoint; it needs torch only.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .code_layout import code_layout, grid_levels

INTERPRETED = False  # tests set it: the kernel then runs on the CPU, in Triton's interpreter
FEW_TOKENS = 16  # new tokens at most: of more the products bind, which other kernels do better
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_GPU = (8, 0)  # compute capability: older ones have too little shared memory for large ranks
MOST_OUTLIERS = 16  # each is compared with every coefficient


def uses_kernel(query: Tensor, *held: Tensor) -> bool:
    """Whether the kernel does queries [B,H,T,..] and a cache of such tensors [..,S,n].

    Torch does where there is no CUDA device, or one from before Ampere, or no triton; in float64; for many new tokens;
    for gradients; and while a graph is traced.
    """
    if (
        not kernel_runs(query.device)
        or query.dtype not in DTYPES
        or query.shape[2] > FEW_TOKENS
        or torch.compiler.is_compiling()
    ):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *held)):
        return False
    return bool(held[0].numel()) and all(not tensor.shape[-1] or tensor.stride(-1) == 1 for tensor in held)


def kernel_runs(device: torch.device) -> bool:
    """Whether the kernel runs there: it reads a token's bytes or numbers one after the other."""
    return INTERPRETED or (device.type == "cuda" and _has_triton() and _new_enough(device))


def codes_for_kernel(query: Tensor, *sides: tuple[Any, Tensor]) -> tuple[Any, ...] | None:
    """The same for a cache of codes: what the kernel reads of it; None where it does not.

    ``sides``: the codecs of latent and rope key, each with its rows [B,S,..].
    """
    few = all(codec.coding.outliers <= MOST_OUTLIERS for codec, _ in sides)
    uses = few and uses_kernel(query, *(rows for _, rows in sides))
    return tuple(_cached(*side) for side in sides) if uses else None


def _cached(codec: Any, rows: Tensor) -> Any:
    from .triton_decode import Cached

    coding = codec.coding
    if coding.kind == "plain":
        return Cached(rows)
    table = coding.kind == "table"
    levels = codec.levels if table else grid_levels(coding.kind, coding.bits[0][0], rows.device)
    layout = code_layout(coding, rows.device)
    return Cached(rows, layout.form, layout.places, levels if levels.numel() else None)


@cache
def _new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_GPU


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

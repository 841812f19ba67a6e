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
MOST_OUTLIERS = 16  # each is compared with every coefficient


def decode_kernel(query: Tensor, *held: Tensor) -> Any | None:
    """The module triton_decode for queries [B,H,T,..] and a cache of such tensors [..,S,n]; None: torch computes it.

    Torch does where there is no CUDA device or no triton; in float64; for many new tokens; for gradients; and while a
    graph is traced.
    """
    runs = INTERPRETED or (query.is_cuda and _has_triton())
    if not runs or query.dtype not in DTYPES or query.shape[2] > FEW_TOKENS or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *held)):
        return None
    if not held[0].numel() or any(tensor.shape[-1] and tensor.stride(-1) != 1 for tensor in held):
        return None
    from . import triton_decode

    return triton_decode


def coded_kernel(query: Tensor, *sides: tuple[Any, Tensor]) -> tuple[Any, list[Any]] | None:
    """The same for a cache of codes, and what the kernel reads; None: torch.

    ``sides``: the codecs of latent and rope key, each with its rows [B,S,..].
    """
    if any(codec.coding.outliers > MOST_OUTLIERS for codec, _ in sides):
        return None
    if (kernel := decode_kernel(query, *(rows for _, rows in sides))) is None:
        return None
    return kernel, [_cached(kernel, *side) for side in sides]


def _cached(kernel: Any, codec: Any, rows: Tensor) -> Any:
    coding = codec.coding
    if coding.kind == "plain":
        return kernel.Cached(rows)
    table = coding.kind == "table"
    levels = codec.levels if table else grid_levels(coding.kind, coding.bits[0][0], rows.device)
    layout = code_layout(coding, rows.device)
    return kernel.Cached(rows, layout.form, layout.places, levels if levels.numel() else None)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

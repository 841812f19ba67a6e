"""Zeros up to the sizes that kernels are compiled for: exact, and paid for in cache where rank or rope grow."""

from __future__ import annotations

from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.errors import InfeasibleError
from anymla.layouts import KERNEL_RANK, KERNEL_ROPE

if TYPE_CHECKING:
    from anymla.exports.fold import Sizes

PADS = ("none", "cpu", "cuda", "full")
BLOCK = 32  # numbers with one scale in llama.cpp's quantised caches


def padded(folder: Path, sizes: Sizes, pad: str) -> Sizes:
    """The sizes of the model in ``folder``, grown to what ``pad``, one of PADS or 'blocks', asks for.

    'cpu': rank 512 and rope 64, the only ones of vLLM's kernel for CPUs. 'cuda': rope 64, nope 64 or 128, value 128,
    for prefill on GPUs. 'full': both, for FlashMLA and TensorRT-LLM. 'blocks': rank and rope whole blocks of 32, for
    llama.cpp's quantised caches.

    Raises:
        InfeasibleError: the model has more than that.
    """
    grown = _grown(sizes, pad)
    for name, size in asdict(sizes).items():
        if size > (room := getattr(grown, name)):
            others = [other for other in ("cuda", "none") if _holds(_grown(sizes, other), sizes)]
            raise InfeasibleError(
                f"{folder}: --pad {pad} has room for a {name} of {room} numbers, and it has {size}: give --pad "
                f"{' or '.join(others)}, for engines without this limit, or convert to a smaller cache"
            )
    return grown


def _holds(grown: Sizes, sizes: Sizes) -> bool:
    return all(room >= size for room, size in zip(astuple(grown), astuple(sizes), strict=True))


def _grown(sizes: Sizes, pad: str) -> Sizes:
    if pad == "none":
        return sizes
    if pad == "blocks":
        return replace(sizes, rank=sizes.rank + -sizes.rank % BLOCK, rope=sizes.rope + -sizes.rope % BLOCK)
    grown = replace(sizes, rope=KERNEL_ROPE)
    if pad in ("cpu", "full"):
        grown = replace(grown, rank=KERNEL_RANK)
    if pad in ("cuda", "full"):
        grown = replace(grown, nope=64 if sizes.nope <= 64 else 128, value=128)
    return grown

"""Zeros up to the sizes that kernels are compiled for: exact, and paid for in cache where rank or rope grow."""

from __future__ import annotations

from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.engine_shapes import GPU, LLAMA_CPP
from anymla.errors import InfeasibleError

if TYPE_CHECKING:
    from anymla.exports.fold import Sizes

PADS = ("none", *GPU.pads)


def padded(folder: Path, sizes: Sizes, pad: str) -> Sizes:
    """The sizes of the model in ``folder``, grown to what ``pad``, one of PADS or 'blocks', asks for.

    Rank and rope are those of engine_shapes.py. 'cpu': the only ones of vLLM's kernel for CPUs. 'cuda': also nope 64 or
    128 and value 128, for prefill on GPUs. 'full': both, for FlashMLA and TensorRT-LLM. 'blocks': rank and rope in
    whole blocks, for llama.cpp's quantised caches.

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
        block = max(LLAMA_CPP.cache_types.values())
        return replace(sizes, rank=sizes.rank + -sizes.rank % block, rope=sizes.rope + -sizes.rope % block)
    rank, rope = GPU.pads[pad]
    grown = replace(sizes, rank=rank or sizes.rank, rope=rope or sizes.rope)
    if pad in ("cuda", "full"):
        grown = replace(grown, nope=64 if sizes.nope <= 64 else 128, value=128)
    return grown

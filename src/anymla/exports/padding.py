"""Zeros up to the sizes that kernels are compiled for: exact, and paid for in cache where rank or rope grow."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from anymla.errors import InfeasibleError
from anymla.exports.fold import Sizes

PADS = ("none", "cpu", "cuda", "full")


def padded(folder: Path, sizes: Sizes, pad: str) -> Sizes:
    """The sizes of the model in ``folder``, grown to what ``pad``, one of PADS, asks for.

    'cpu': rank 512 and rope 64, the only ones of vLLM's kernel for CPUs. 'cuda': rope 64, nope 64 or 128, value 128,
    for prefill on GPUs. 'full': both, for FlashMLA and TensorRT-LLM.

    Raises:
        InfeasibleError: the model has more than that.
    """
    if pad == "none":
        return sizes
    grown = replace(sizes, rope=64)
    if pad in ("cpu", "full"):
        grown = replace(grown, rank=512)
    if pad in ("cuda", "full"):
        grown = replace(grown, nope=64 if sizes.nope <= 64 else 128, value=128)
    for name, size in asdict(sizes).items():
        if size > asdict(grown)[name]:
            raise InfeasibleError(
                f"{folder}: --pad {pad} has room for a {name} of {asdict(grown)[name]} numbers, and it has {size}: "
                "convert to a smaller cache, or give --pad none for engines without this limit"
            )
    return grown

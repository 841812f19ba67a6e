"""Weights that a checkpoint holds packed: where a step leaves one as it was, it stays packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anymla.io.checkpoint import check_weights
from anymla.io.safetensors import read_header

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("weight_packed", "weight_scale", "weight_shape")


class PackedFiles:
    """The packed weights in the files of ``folder``, as anymla writes them."""

    def __init__(self, folder: Path) -> None:
        files = check_weights(folder, floats=False)
        self._stored = {name: tensor for file in files for name, tensor in read_header(file).items()}

    def kept(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` of a layer, with the packed parts of every weight that is still what they stand for."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = self._parts(name.removesuffix("weight"), tensor) if name.endswith(".weight") else None
            found |= {name: tensor} if parts is None else parts
        return found

    def _parts(self, place: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not all(f"{place}{part}" in self._stored for part in PARTS):
            return None
        from anymla.io.sources import formulae

        words, scale, shape = (self._stored[f"{place}{part}"].read() for part in PARTS)
        plain = formulae.packed(words, scale, shape, None, None).to(scale.dtype)  # as the step read it
        if not weight.cpu().equal(plain.to(weight.dtype)):
            return None
        return dict(zip((f"{place}{part}" for part in PARTS), (words, scale, shape), strict=True))

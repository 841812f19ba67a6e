"""Safetensors files tensor by tensor, by plain reads and writes: mapped pages would pile up in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 24  # bytes read at once
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
NAMES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: ``size`` bytes from ``start``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def meta(self) -> Tensor:
        """Its shape and dtype without its numbers."""
        import torch

        return torch.empty(self.shape, dtype=getattr(torch, DTYPES[self.dtype]), device="meta")

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            OSError: the file is gone or ends too early.
        """
        import torch

        content = torch.empty(self.size, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(bytes_of(content)) != self.size:
                raise OSError(f"{self.file} ends too early")
        return content.view(getattr(torch, DTYPES[self.dtype])).view(self.shape)

    def blocks(self) -> Iterator[bytes]:
        """The bytes, a block at a time."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            for left in range(self.size, 0, -BLOCK):
                if not (block := file.read(min(BLOCK, left))):
                    raise OSError(f"{self.file} ends too early")
                yield block


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in the header's order.

    Raises:
        CheckpointError: a dtype that torch does not hold.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {entry['dtype']}, which anymla does not read")
        first, last = entry["data_offsets"]
        stored[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
    return stored


def scan(path: Path, dtype: str | None) -> str:
    """The SHA-256 of a whole file, every number of which was found finite, as ``dtype`` where that is given.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or a number too large for ``dtype``.
    """
    import torch

    digest = hashlib.sha256()
    stored = sorted(read_header(path).items(), key=lambda item: item[1].start)
    with open(path, "rb") as file:
        length = int.from_bytes(prefix := file.read(8), "little")
        digest.update(prefix + file.read(length))
    for name, tensor in stored:
        kind = getattr(torch, DTYPES[tensor.dtype])
        for block in tensor.blocks():
            digest.update(block)
            if kind.is_floating_point and kind.itemsize > 1:
                numbers = torch.frombuffer(bytearray(block), dtype=kind)
                if not numbers.to(getattr(torch, dtype) if dtype else kind).isfinite().all():
                    raise CheckpointError(f"{path.parent}: tensor {name} holds NaN or infinity")
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Writes a safetensors file whole or not at all; what is ``Stored`` is copied from file to file.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    facts = {name: _facts(tensor) for name, tensor in tensors.items()}
    # largest numbers first, so that each tensor begins at a multiple of its width
    order = sorted(tensors, key=lambda name: (-facts[name][2] // max(1, facts[name][3]), name))
    spans, end = {}, 0
    for name in order:
        spans[name] = (end, end := end + facts[name][2])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, *_) in facts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": spans[name]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            for block in _blocks(tensors[name]):
                file.write(block)
        durable(file)
    partial.replace(path)


def durable(file: Any) -> None:
    """Everything written to ``file`` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read from or write to."""
    import torch

    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _facts(tensor: Tensor | Stored) -> tuple[str, list[int], int, int]:
    """Dtype code, shape, bytes, numbers."""
    if isinstance(tensor, Stored):
        numbers = 1
        for length in tensor.shape:
            numbers *= length
        return tensor.dtype, list(tensor.shape), tensor.size, numbers
    code = NAMES[str(tensor.dtype).removeprefix("torch.")]
    return code, list(tensor.shape), tensor.numel() * tensor.element_size(), tensor.numel()


def _blocks(tensor: Tensor | Stored) -> Iterator[Any]:
    if isinstance(tensor, Stored):
        yield from tensor.blocks()
    else:
        yield bytes_of(tensor.detach().cpu().contiguous())

"""Tuning the zero points of packed weights: all else is plain while they learn, and packed as it was after that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anymla.architectures.packed import packing_of
from anymla.errors import CheckpointError
from anymla.io.checkpoint import check_weights
from anymla.io.safetensors import read_header, write_tensors
from anymla.io.shards import INDEX
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.methods.tune import Tune
from anymla.modeling.spec import layers_of

ZEROS = ".zeros.weight"


def check_packed(student: Path, config: Mapping[str, Any], tuning: Tune) -> None:
    """Refuses packed weights that do not learn, and to train zero points that are not there.

    Raises:
        CheckpointError: the model at ``student``, which has this ``config``, cannot be tuned so.
    """
    layers, packed = layers_of(config) or (), packing_of(config) is not None
    if tuning.learns_zeros and (not packed or all(layer.zeros is None for layer in layers)):
        raise CheckpointError(f"{student} has no zero points to train: pack it with rtn, hqq or gptq and zeros: true")
    if not tuning.learns_zeros and (packed or any(layer.packed is not None for layer in layers)):
        raise CheckpointError(
            f"{student} has packed weights, which do not learn: tune the model of before that step, or give train: "
            "zero_points where it has these"
        )


@contextmanager
def unpacked(student: Path, tuning: Tune) -> Iterator[Path]:
    """The model at ``student`` as it is trained: with plain weights where its zero points learn."""
    if not tuning.learns_zeros:
        yield student
        return
    with plain_source(locate(student)) as plain:
        yield plain.folder


def pack_again(student: Path, learner: Path, folder: Path) -> None:
    """Puts the packed weights of ``student`` in the place of the plain ones in ``folder``; zero points stay.

    ``learner``: what :func:`unpacked` gave; where that is the student itself, all stays.
    """
    if learner == student:
        return
    tensors = {name: tensor for file in check_weights(folder) for name, tensor in read_header(file).items()}
    learned = {name: tensor.read() for name, tensor in tensors.items() if name.endswith(ZEROS)}
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    files = check_weights(student, floats=False)
    for file in files:
        target = folder / file.name
        write_tensors(target, {name: learned.get(name, tensor) for name, tensor in read_header(file).items()})
        shutil.copymode(file, target)
    if len(files) > 1:
        shutil.copy(student / INDEX, folder)
    shutil.copy(student / "config.json", folder)

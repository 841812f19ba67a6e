"""Whether two models are a converted one and its original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from anymla.architectures.model_spec import read_config, spec_of
from anymla.errors import CheckpointError
from anymla.methods.tune import Tune
from anymla.modeling.spec import KEY, OLD_KEY
from anymla.training.packed import check_packed


def by_logits_where_layers_differ(
    tuning: Tune, student: Path, teacher: Path, note: Callable[[str], None] | None
) -> Tune:
    """``tuning`` without its loss of layers, where the student has fewer of them, or learns in all parts of them."""
    if tuning.learns_zeros:
        return tuning.model_copy(update={"layerwise": 0.0})
    if not tuning.layerwise or _layers(student) >= _layers(teacher):
        return tuning
    if note is not None:
        note("the model has fewer layers than its original: tuning goes by logits alone, as with layerwise 0")
    return tuning.model_copy(update={"layerwise": 0.0})


def check_pair(student: Path, teacher: Path, tuning: Tune) -> None:
    """Refuses a model that no step of anymla made another one, and a teacher that cannot be its original.

    Raises:
        CheckpointError: which of them, and why.
    """
    ours, theirs = read_config(student), read_config(teacher)
    check_packed(student, ours, tuning)
    stock = not str(ours.get("model_type")).startswith("anymla_") or not {KEY, OLD_KEY} & ours.keys()
    if stock and (ours.get("model_type") != theirs.get("model_type") or _sizes(ours) == _sizes(theirs)):
        raise CheckpointError(
            f"{student} was not converted by anymla, so it lost nothing that tuning could bring back: first anymla "
            f"convert {student} -o CONVERTED"
        )
    family = str(ours["model_type"]).removeprefix("anymla_")
    if theirs.get("model_type") != family:
        raise CheckpointError(
            f"--teacher {teacher} is a {theirs.get('model_type')!s:.40} and {student} was a {family}: "
            "give the model it was converted from"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        fewer = name == "num_hidden_layers" and _layers(student) < _layers(teacher)
        if name in theirs and ours.get(name, theirs[name]) != theirs[name] and not fewer:
            raise CheckpointError(
                f"--teacher {teacher} has a {name} of {theirs[name]!s:.20} and {student} one of {ours[name]!s:.20}: "
                "give the model it was converted from"
            )


def _sizes(config: dict[str, Any]) -> tuple[Any, int, int]:
    """What a step may change of a stock model."""
    spec = spec_of(config)
    return spec.layers, spec.intermediate_size, spec.routed_experts


def _layers(folder: Path) -> int:
    return len(spec_of(read_config(folder)).layers)

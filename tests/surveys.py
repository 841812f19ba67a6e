"""Surveys as a method may define them, and what runs them on a saved model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from anymla.architectures.model_spec import converted_spec, read_config, read_model_spec
from anymla.distributed import all_sum
from anymla.io.safetensors import Stored
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.base import Facts, Plan, Survey
from anymla.model_run.stream import LayerBatch
from anymla.modeling.spec import layers_of
from anymla.sweep.layer import CalibrationSplit, Layer
from anymla.sweep.progress import claim
from anymla.sweep.survey import run_survey


class WeightSums:
    """Sums over windows something of each weight and its gradient."""

    def __init__(self, layer: Layer, of: Any) -> None:
        self.weights, self.of = dict(layer.module.named_parameters()), of
        self.sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def add(self, batch: LayerBatch) -> None:
        """Takes one window."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.sums[name] += self.of(weight, weight.grad)


class Fisher(Survey):
    """The diagonal of the empirical Fisher matrix, summed over windows: a tensor for each weight."""

    backward = True

    def observer(self, layer: Layer) -> WeightSums:
        return WeightSums(layer, lambda weight, gradient: gradient.square())

    def layer(self, layer: Layer, observed: WeightSums) -> dict[str, Any]:
        return {name: all_sum(values) for name, values in observed.sums.items()}


class Taylor(Survey):
    """First-order Taylor scores: the loss that each weight's removal would add, per window, as one number a weight."""

    backward = True

    def __init__(self, layers: set[int] | None = None) -> None:
        self.looked_at = layers

    def layers(self, total: int) -> set[int]:
        return set(range(total)) if self.looked_at is None else self.looked_at

    def observer(self, layer: Layer) -> WeightSums:
        return WeightSums(layer, lambda weight, gradient: (weight * gradient).abs())

    def layer(self, layer: Layer, observed: WeightSums) -> dict[str, Any]:
        return {"scores": {name: all_sum(values.sum()).item() for name, values in observed.sums.items()}}


class Hidden(Survey):
    """Forwards: norms of the hidden states before and after each layer, and the sum of those before as a tensor."""

    def observer(self, layer: Layer) -> HiddenSums:
        return HiddenSums()

    def layer(self, layer: Layer, observed: HiddenSums) -> dict[str, Any]:
        before = layer.converted[:].double().square().sum()
        norms = (all_sum(value).item() for value in (before, observed.before, observed.after))
        return {"norms": list(norms), "index": layer.index, "mean": all_sum(observed.sum)}


class HiddenSums:
    """Sums over the batches of a layer."""

    def __init__(self) -> None:
        self.before = self.after = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(())

    def add(self, batch: LayerBatch) -> None:
        """Takes one batch."""
        assert batch.gradient is None
        self.before = self.before + batch.hidden.double().square().sum()
        self.after = self.after + batch.output.double().square().sum()
        self.sum = self.sum + batch.hidden.sum((0, 1))


def surveyed(
    survey: Survey,
    folder: Path,
    windows: torch.Tensor,
    output: Path,
    *,
    memory: int = 1 << 30,
    skip: set[int] | None = None,
    dtype: str | None = None,
) -> Facts:
    """Runs ``survey`` on the model in ``folder``, or goes on; layers in ``skip`` stay as they are."""
    source, config = StreamedModel(folder, dtype=dtype, device="cpu"), read_config(folder)
    model = converted_spec(config) if layers_of(config) else read_model_spec(config)
    choices = tuple(None if index in (skip or ()) else "some" for index in range(len(model.layers)))
    work = WorkFolder(output)
    claim(work, lambda: {"survey": type(survey).__name__}, restart=False)
    try:
        return run_survey(survey, source, model, Plan(after=model, choices=choices), windows, work, memory=memory)
    finally:
        work.release()


def in_memory(facts: Facts) -> list[dict[str, Any] | None]:
    """Facts whose tensors are read."""
    return [
        None
        if fact is None
        else {name: value.read() if isinstance(value, Stored) else value for name, value in fact.items()}
        for fact in facts
    ]


def digest(facts: Facts) -> str:
    """What tells facts from all others, to the bit."""
    named = [
        None
        if fact is None
        else {
            name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for name, value in fact.items()
        }
        for fact in in_memory(facts)
    ]
    return hashlib.sha256(repr(named).encode()).hexdigest()


def fitted(windows: torch.Tensor) -> torch.Tensor:
    """The windows that a backward survey looks at."""
    return windows[: CalibrationSplit.of(len(windows)).choice.stop]

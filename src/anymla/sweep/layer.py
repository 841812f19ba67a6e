"""What a method gets of one layer, and what it may listen with while the original layer runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anymla.architectures.families import Family
from anymla.architectures.parts import attention_path
from anymla.errors import UnsupportedModelError
from anymla.model_run.activations import Activations
from anymla.model_run.stream import LayerBatch
from anymla.modeling.spec import LayerSpec


@dataclass(frozen=True)
class CalibrationSplit:
    """Which calibration windows serve what: to fit on, to choose on, and for the report at the end."""

    fit: slice
    choice: slice
    held_out: slice

    @classmethod
    def of(cls, windows: int) -> CalibrationSplit:
        """Five eighths to fit, two to choose, one held out."""
        held_out, choice = max(1, windows // 8), max(1, windows // 4)
        first, second = windows - held_out - choice, windows - held_out
        return cls(slice(0, first), slice(first, second), slice(second, windows))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer, its weights there, as the sweep hands it to a method.

    Args:
        index, module, name: its number, the module itself, and its dotted name in the model.
        old, planned: what it is and what the plan makes of it; the same where it is removed.
        choice: what the plan chose for it; below: the results of the layers before it, None for those left as they are.
        arguments: what the module is called with beside hidden states.
        windows: which windows of both streams serve what.
        batch: windows that fit into memory at once.
        config, family: the language model's; new_config: its config after the step, for stock modules of other sizes.
        saved, dtypes: the dtype of its new weights in the checkpoint, and those that its own have there.
        original: the original's hidden states [N,T,D] before this layer; after it, once the original layer has run.
        converted: those of the converted model before this layer.
        weights_of: reads the weights of another layer of the original, by its number.
    """

    index: int
    module: Any
    name: str
    old: LayerSpec
    planned: LayerSpec
    choice: Any
    below: tuple[dict[str, Any] | None, ...]
    arguments: dict[str, Any]
    windows: CalibrationSplit
    batch: int
    config: Any
    new_config: Any
    family: Family
    saved: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    original: Activations
    converted: Activations
    weights_of: Callable[[int], dict[str, Tensor]]

    @property
    def attention_path(self) -> str:
        """Where in ``module`` its attention is.

        Raises:
            UnsupportedModelError: there is none.
        """
        if self.old.kind is not None and self.old.module is not None:
            return self.old.module.removeprefix(f"{self.name}.")
        if (path := attention_path(self.module)) is None:
            raise UnsupportedModelError(f"{type(self.module).__name__} has no attention where its config says so")
        return path

    @property
    def attention(self) -> nn.Module:
        """The attention in ``module``."""
        attention: nn.Module = self.module.get_submodule(self.attention_path)
        return attention


class Observer(Protocol):
    """Collects what a method needs of a layer."""

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch of the original's stream; called for all of them, in order."""

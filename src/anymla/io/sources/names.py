"""Which tensor of a checkpoint is which of the model: transformers renames many of them when it loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from anymla.io.auto import auto_class


class NamesInModel:
    """The names of a checkpoint's tensors by those in its model.

    ``ties``: names in the model that are tied to others.
    """

    def __init__(self, config: Mapping[str, Any], names: Iterable[str]) -> None:
        with torch.device("meta"):
            self._model = auto_class(config["model_type"]).from_config(AutoConfig.for_model(**config))
        mapping = get_model_conversion_mapping(self._model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._state = self._model.state_dict()
        self.ties: dict[str, str] = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        self._stored: dict[str, list[str]] = {}
        for name in names:
            self._stored.setdefault(self.in_model(name), []).append(name)

    def in_model(self, name: str) -> str:
        """Returns what the model calls a tensor that a file calls ``name``, or that an older transformers did."""
        if name in self._state:
            return name
        renamed: str = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._state
        )[0]
        return renamed

    def stored(self, name: str) -> str | None:
        """The tensor in the files that alone makes the model's tensor ``name``, or None."""
        found = self._stored.get(name, [])
        return found[0] if len(found) == 1 else None

    def is_turned(self, module: str) -> bool:
        """Returns whether a module's weight is [in, out], as GPT-2's are."""
        name = self.in_model(f"{module}.weight").rpartition(".")[0]
        try:
            return type(self._model.get_submodule(name)).__name__ == "Conv1D"
        except AttributeError:  # there is none
            return False

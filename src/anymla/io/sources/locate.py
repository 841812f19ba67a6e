"""Where a source's weights, its GGUF file and its adapter are; nothing large is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.errors import CheckpointError, shown
from anymla.io.config import read_object
from anymla.io.find import find_model
from anymla.io.mistaken import no_folder
from anymla.io.sources.quantised_kinds import quantization_note

if TYPE_CHECKING:
    from anymla.io.sources.gguf import GgufFile

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

SAFE = ("*.safetensors", "*.safetensors.index.json")
WEIGHTS = (*SAFE, "*.bin", "*.gguf")


@dataclass(frozen=True, kw_only=True)
class Located:
    """The place of a source.

    ``name``: what the user gave; ``base``: the folder of weights, or the GGUF file; ``adapter``: the folder of an
    adapter to be merged; ``hidden``: whether ``base`` holds an adapter that is left out.
    """

    name: str
    base: Path
    adapter: Path | None = None
    hidden: bool = False

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The file, read once, where the weights are one; it raises what is wrong with it."""
        if not self.base.is_file():
            return None
        from anymla.io.sources.gguf import GgufFile

        return GgufFile(self.base)

    @property
    def is_converted(self) -> bool:
        """Returns whether anymla wrote the weights' folder."""
        path = self.base / "config.json"
        return path.is_file() and str(read_object(path).get("model_type")).startswith("anymla_")

    @cached_property
    def quantised(self) -> str | None:
        """Returns what becomes of quantised weights, in words; None where there are none."""
        path = self.base / "config.json"
        return quantization_note(read_object(path)) if path.is_file() else None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Returns the paths that are only read."""
        return (self.base,) if self.adapter is None else (self.base, self.adapter)


def locate(model: str | Path, *, adapter: str | Path | None = None, config_only: bool = False) -> Located:
    """Finds ``model``: a folder, a GGUF file, a folder that holds one, an adapter's folder, or a hub id of these.

    Args:
        model: what the user gave.
        adapter: a folder or hub id of an adapter to merge; ``none`` leaves out one that lies beside the weights.
        config_only: of a hub id, fetch the configs alone.

    Raises:
        CheckpointError: it is none of these, or an adapter's base model is not known or not here.
    """
    path, name = find_model(model, config_only=config_only), str(model)
    without = str(adapter) == "none"
    given = None if adapter is None or without else _adapter(adapter, config_only)
    own = (path / ADAPTER_CONFIG).is_file()
    alone = own and (not (path / "config.json").is_file() or not (config_only or _has_weights(path)))
    if alone:
        if adapter is not None:
            what = "--adapter none leaves nothing of it" if without else "merge one first (peft: merge_and_unload)"
            raise CheckpointError(f"{name} is itself an adapter: {what}")
        return Located(name=name, base=_weights(_base_of(path, name, config_only)), adapter=path)
    if own and given is None and not without:
        given = path
    return Located(name=name, base=_weights(path), adapter=given, hidden=own and given != path)


def _weights(path: Path) -> Path:
    """``path``, or the GGUF file that is all the weights there are in it."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} {no_folder(path)}")
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or _has_weights(path, SAFE):
        return path
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one of them ({names})")
    return files[0]


def _has_weights(folder: Path, kinds: tuple[str, ...] = WEIGHTS) -> bool:
    """Whether a folder holds weights other than an adapter's."""
    return any(not file.name.startswith("adapter_") for kind in kinds for file in folder.glob(kind))


def _adapter(adapter: str | Path, config_only: bool) -> Path:
    path = find_model(adapter, config_only=config_only)
    if not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"--adapter {adapter} has no {ADAPTER_CONFIG}: give the folder that peft saved")
    return path


def _base_of(adapter: Path, name: str, config_only: bool) -> Path:
    """The base model of an adapter, as its config names it: a path seen from here or from its folder, or a hub id."""
    base = read_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{name} is an adapter and does not name its base model: give BASE --adapter {name}")
    beside = adapter / base
    try:
        return find_model(beside if not os.path.exists(base) and beside.exists() else base, config_only=config_only)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} is an adapter and its base model {shown(base)} is not here: give BASE --adapter {name}"
        ) from error

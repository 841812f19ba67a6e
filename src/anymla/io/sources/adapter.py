"""LoRA adapters of peft, merged into a source tensor by tensor: no model is filled, and peft is not needed.

LoRA: arXiv 2106.09685; rank-stabilised: arXiv 2312.03732; DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import CheckpointError, UnsupportedModelError, shown
from anymla.io.config import read_object
from anymla.io.safetensors import Stored, read_header
from anymla.io.shards import held_tensors
from anymla.io.sources.adapter_kinds import MERGE, check_adapter
from anymla.io.sources.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from anymla.io.sources.low_rank import LowRank
from anymla.io.sources.names import NamesInModel
from anymla.io.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor

PART = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class _Adapter:
    """``low_rank``: by the module's name; ``whole``: tensors in the place of the base's, by the tensor's name."""

    folder: Path
    config: Mapping[str, Any]
    low_rank: dict[str, LowRank]
    whole: dict[str, Stored]


def with_adapter(source: Source, folder: Path) -> Source:
    """``source`` with the adapter in ``folder`` merged into it.

    Raises:
        CheckpointError: the adapter's files are broken, or its base is another model.
        UnsupportedModelError: it is more than LoRA on weights.
    """
    check_adapter(folder)
    names = NamesInModel(source.config, source.names)
    adapter = _read(folder, names)
    low_rank = {
        _place(adapter, names, f"{module}.weight", module): change for module, change in adapter.low_rank.items()
    }
    whole = {_place(adapter, names, name, name.rpartition(".")[0]): tensor for name, tensor in adapter.whole.items()}
    changed = low_rank.keys() | whole.keys()
    ties = {name: names.stored(other) for name, other in names.ties.items() if names.stored(name) is None}
    extra = {name: owner for name, owner in ties.items() if owner is not None and {name, owner} & changed}
    if extra and adapter.config.get("ensure_weight_tying"):
        raise UnsupportedModelError(f"{folder}: ensure_weight_tying on {min(extra)} is not merged here: {MERGE}")
    return replace(
        source,
        config=_untied(source.config) if extra else source.config,
        names=source.names | frozenset(extra),
        tensors=partial(_merged, source, adapter, low_rank, whole, extra),
        companions=partial(_companions, source, folder),
    )


def _read(folder: Path, names: NamesInModel) -> _Adapter:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = " but .bin, which can run code when opened" if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{folder} holds no {ADAPTER_WEIGHTS}{pickled}: save the adapter with peft once more")
    held_tensors([file])  # whole, and of float dtypes
    config = read_object(folder / ADAPTER_CONFIG)
    parts: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, tensor in read_header(file).items():
        inner = name.removeprefix("base_model.model.")
        if found := PART.match(inner):
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif "lora" in inner or "prompt" in inner:
            raise UnsupportedModelError(f"{folder}: its tensor {shown(inner)} is not merged here: {MERGE}")
        else:
            whole[inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    low_rank = {
        module: LowRank.of(folder, config, module, found, turned=names.is_turned(module))
        for module, found in parts.items()
    }
    if not low_rank and not whole:
        raise CheckpointError(f"{file} holds no tensors")
    return _Adapter(folder, config, low_rank, whole)


def _place(adapter: _Adapter, names: NamesInModel, name: str, module: str) -> str:
    """The tensor of the source that the adapter calls ``name``, or the model's own name of one that is only tied.

    Raises:
        CheckpointError: the base has no such module.
    """
    inside = names.in_model(name)
    if (stored := names.stored(inside)) is not None:
        return stored
    if inside in names.ties:
        return inside
    raise CheckpointError(
        f"{adapter.folder} targets {shown(module)}, which its base model does not have as a weight of its own: give "
        f"the model that it was trained on, or {MERGE}"
    )


def _merged(
    source: Source,
    adapter: _Adapter,
    low_rank: Mapping[str, LowRank],
    whole: Mapping[str, Stored],
    extra: Mapping[str, str],
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors with their changes; a tensor that was tied comes after the one it was tied to."""

    def changed(name: str, tensor: Tensor) -> Tensor:
        if (new := whole.get(name)) is not None:
            if new.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{adapter.folder}: {name} has the shape {list(new.shape)} and its base {list(tensor.shape)}: "
                    f"resize the base's vocabulary, or {MERGE}"
                )
            tensor = new.read().to(tensor.dtype)
        return low_rank[name].merged(name, tensor) if name in low_rank else tensor

    for name, tensor in source.tensors():
        for other, owner in extra.items():
            if owner == name:
                yield other, changed(other, tensor.clone())
        yield name, changed(name, tensor)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = dict(config) | {"tie_word_embeddings": False}
    if isinstance(text := untied.get("text_config"), dict):
        untied["text_config"] = _untied(text)
    return untied


def _companions(source: Source, adapter: Path, folder: Path) -> None:
    """The base's files; the tokenizer and chat template that were saved with the adapter go before."""
    source.companions(folder)
    for file in sorted({file for kind in TOKENIZER_FILES for file in adapter.glob(kind) if file.is_file()}):
        shutil.copyfile(file, folder / file.name)

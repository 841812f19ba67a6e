"""GGUF files as sources: config, tokenizer and tensor names as transformers reads them, one layer at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import CheckpointError, UnsupportedModelError, shown
from anymla.io.auto import auto_class
from anymla.io.checkpoint import quiet_transformers
from anymla.io.sources.gguf_rope import FACTORS, scaled_rope
from anymla.io.sources.source import Source
from anymla.io.work import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUMBERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # types that are no blocks
ENDS = ("eos", "eot", "eom")  # tokens at which generation ends


class GgufFile:
    """A GGUF file whose metadata were read.

    ``config``: the config.json that it means; ``note``: what becomes of its weights, in words.

    Raises:
        CheckpointError: it is no GGUF file, one part of several, or gguf is not installed.
        UnsupportedModelError: transformers cannot read its architecture.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.reader = file, _opened(file)
        count = Counter(tensor.tensor_type.name for tensor in self.reader.tensors)
        types = ", ".join(f"{number} {name}" for name, number in count.most_common())
        self.dtype = _dtype(self.reader)
        self.config = _config(file, self.reader)
        self.note = f"the tensors of {file.name} ({types}) become {self.dtype}"

    def source(self) -> Source:
        """The checkpoint in it.

        Raises:
            UnsupportedModelError: transformers has no place for a tensor, or cannot read its tokenizer.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        processor, mapping = _mapping(self.file, self.reader, self.config)
        return Source(
            config=self.config,
            names=frozenset(mapping.values()),
            size=sum(int(tensor.n_elements) for tensor in self.reader.tensors) * dtype.itemsize,
            tensors=partial(_tensors, self.file, self.reader, processor, mapping, dtype),
            companions=partial(_companions, self.file, self.reader),
        )


def _opened(file: Path) -> Any:
    if find_spec("gguf") is None:
        raise CheckpointError(f"{file} is a GGUF file: pip install 'anymla[gguf]' to read it")
    if part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", file.name):
        raise CheckpointError(
            f"{file} is one of {int(part[1])} parts: join them with llama.cpp's llama-gguf-split --merge"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # it reads whatever is there, and fails anywhere
        raise CheckpointError(f"{file} is truncated or not a GGUF file: {' '.join(str(error).split()):.160}") from error
    if not isinstance(_field(reader, "general.architecture"), str) or not reader.tensors:
        raise CheckpointError(f"{file} holds no model: it has no architecture or no tensors")
    return reader


def _field(reader: Any, name: str) -> Any:
    """A value of the file's metadata, or None."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _dtype(reader: Any) -> str:
    """The dtype of the plain checkpoint: that of the matrices, bfloat16 where they are quantised."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    if types - NUMBERS.keys() or not types:
        return "bfloat16"
    return next(NUMBERS[name] for name in ("BF16", "F16", "F32") if name in types)


def _config(file: Path, reader: Any) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    quiet_transformers()
    architecture = _field(reader, "general.architecture")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).to_dict()
    except Exception as error:  # a KeyError where a key is absent, ValueErrors and others
        raise UnsupportedModelError(
            f"{file}: transformers cannot read a GGUF file of architecture {architecture} "
            f"({' '.join(str(error).split()):.120}): give the model's safetensors"
        ) from error
    model_type = config["model_type"]
    if model_type not in CLASSES:
        raise UnsupportedModelError(f"{file}: family {shown(model_type)} is no decoder that generates text")
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    config |= {"architectures": [CLASSES[model_type]], "dtype": _dtype(reader)} | _token_ids(reader)
    config["rope_parameters"] = scaled_rope(
        file,
        config,
        lambda name: _field(reader, f"{architecture}.rope.scaling.{name}"),
        next((tensor.data for tensor in reader.tensors if tensor.name == FACTORS), None),
    )
    return config  # type: ignore[no-any-return]


def _token_ids(reader: Any) -> dict[str, Any]:
    """What a config and a generation config say of special tokens, as far as the file does."""
    known = {name: _field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", *ENDS)}
    ends = list(dict.fromkeys(known[name] for name in ENDS if known[name] is not None))
    ids = {"bos_token_id": known["bos"], "pad_token_id": known["padding"]}
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {name: value for name, value in ids.items() if value is not None}


def _mapping(file: Path, reader: Any, config: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """What transformers does to the tensors of this architecture, and their names in the model.

    Raises:
        UnsupportedModelError: a tensor has no place in transformers' model, which would leave it out without a word.
    """
    import torch
    from transformers import AutoConfig
    from transformers import modeling_gguf_pytorch_utils as theirs

    try:
        read = theirs.load_gguf_checkpoint(file, return_tensors=False)["config"]
        kind = theirs.TENSOR_PROCESSORS.get(_field(reader, "general.architecture"), theirs.TensorProcessor)
        processor = kind(config=read)
        with torch.device("meta"):
            model = auto_class(config["model_type"]).from_config(AutoConfig.for_model(**config))
        mapping: dict[str, str] = theirs.get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # configs and transformers' own checks raise anything
        raise UnsupportedModelError(
            f"{file}: transformers cannot read it: {' '.join(str(error).split()):.200}"
        ) from error
    placed = mapping.keys() | {f"{name}.weight" for name in mapping} | {FACTORS}  # experts go by names without .weight
    if others := [tensor.name for tensor in reader.tensors if tensor.name not in placed]:
        raise UnsupportedModelError(
            f"{file}: transformers has no place for its tensor {shown(others[0])} in a {config['model_type']}: give "
            "the model's safetensors"
        )
    return processor, mapping


def _tensors(
    file: Path, reader: Any, processor: Any, mapping: Mapping[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model, a layer's at a time: what transformers makes of several is of one layer."""
    layers: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        layer = re.match(r"blk\.\d+\.", tensor.name)
        layers.setdefault(layer[0] if layer else tensor.name, []).append(tensor)
    for parts in layers.values():
        made: dict[str, Tensor] = {}
        for part in parts:
            _add(made, file, part, processor, mapping)
        for name in sorted(made):
            yield name, made.pop(name).to(dtype)


def _add(made: dict[str, Tensor], file: Path, part: Any, processor: Any, mapping: Mapping[str, str]) -> None:
    """De-quantises one tensor of the file; what it is in the model goes to ``made``."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    # a plain read: mapped pages would pile up
    stored = np.fromfile(file, dtype=np.uint8, count=int(part.n_bytes), offset=int(part.data_offset))
    numbers = dequantize(stored.view(part.data.dtype).reshape(part.data.shape), part.tensor_type)
    done = processor.process(
        weights=numbers, name=part.name, tensor_key_mapping=mapping, parsed_parameters={"tensors": made}
    )
    if done.name in mapping:
        made[mapping[done.name]] = torch.from_numpy(np.array(done.weights, order="C"))


def _companions(file: Path, reader: Any, folder: Path) -> None:
    """Writes tokenizer, chat template and generation settings, as far as the file has them.

    Raises:
        UnsupportedModelError: transformers cannot read its tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # tokenizers raise anything
        raise UnsupportedModelError(
            f"{file}: transformers cannot read its tokenizer: {' '.join(str(error).split()):.200}"
        ) from error
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", _token_ids(reader))

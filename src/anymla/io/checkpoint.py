"""Checkpoint folders: finding and checking one, loading its model, writing a converted one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anymla.errors import CheckpointError, OutputError
from anymla.io.auto import auto_class
from anymla.io.config import danger, read_object
from anymla.io.extra import misplaced
from anymla.io.hub_cache import in_part
from anymla.io.locks import lock_folder, unlock
from anymla.io.mistaken import other_config, stand_in
from anymla.io.shards import INDEX, SINGLE, check_amount, check_index, held_tensors, index_of, shard_files
from anymla.io.work import clear_abandoned, remove

ACCOUNT = "account.json"  # bytes of the weights beside it


def check_weights(folder: Path, *, floats: bool = True) -> list[Path]:
    """The safetensors files of a checkpoint, each opened and found whole; with ``floats``, its weights are of floats.

    Raises:
        CheckpointError: no safetensors, a shard is missing or truncated, or the index names a file outside the folder.
    """
    files = _weight_files(folder)
    held_tensors(files, floats=floats)
    return files


def _weight_files(folder: Path) -> list[Path]:
    if (index := index_of(folder)) is not None:
        return shard_files(index)
    if os.path.isfile(single := folder / SINGLE):
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights (.bin) only, which can run code when opened; anymla reads safetensors: "
            "save the model with save_pretrained of transformers 5"
        )
    for path in (single, folder / INDEX):
        if os.path.islink(path):
            raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which is not there{in_part(folder)}")
    raise CheckpointError(f"{folder} has no model.safetensors and no {INDEX}{in_part(folder)}")


def load_model(folder: Path, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """The causal or vision-language model of ``folder``, ready to evaluate.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or holds NaN or infinity.
    """
    import torch

    config = safe_config(folder)
    held = held_tensors(check_weights(folder))
    if (index := index_of(folder)) is not None and not isinstance(read_object(index).get("metadata"), dict):
        raise CheckpointError(f'{index} has no metadata, which transformers asks for: add "metadata": {{}} to it')
    try:
        check_amount(folder, config, held)
        model, info = auto_class(config.model_type).from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,  # nor ask whether to
            ignore_mismatched_sizes=True,  # reported below, by name
            **implementations(config, dtype),
        )
    except CheckpointError:
        raise
    except Exception as error:  # configs, tensors and transformers' own checks raise anything
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split()):.300}") from error
    check_loading(folder, info, model, held)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: tensor {name} holds NaN or infinity")
    return model.to(device).eval().requires_grad_(False)


def safe_config(folder: Path) -> Any:
    """The config of ``folder`` as transformers has it, once nothing in it was found that must not reach a loader.

    Raises:
        CheckpointError: it asks for code from the hub, means a size that no model has, or cannot be used.
    """
    from transformers import AutoConfig

    fields = read_object(folder / "config.json")
    if (reason := other_config(fields) or danger(fields)) is not None:
        raise CheckpointError(f"{folder}/{reason}")
    quiet_transformers()
    _check_generation(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configs and transformers' own checks raise anything
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split()):.300}") from error


def check_loading(folder: Path, info: dict[str, Any], model: Any, stored: Collection[str] | None = None) -> None:
    """Refuses a checkpoint whose tensors are not those of its model; ``info`` is transformers' account of loading it.

    ``stored``: names in its files, to which its index is held.

    Raises:
        CheckpointError: names the first tensor that is missing, has the wrong shape, or has no place in a layer.
    """
    tied = model.all_tied_weights_keys or {}
    for kind, names in (
        ("has a tensor that its config has no place for:", misplaced(info["unexpected_keys"], model.config)),
        ("lacks the tensor", info["missing_keys"] - tied.keys() or info["missing_keys"]),
        ("has a tensor of wrong shape:", info["mismatched_keys"]),
    ):
        if names:
            first = sorted(names, key=str)[0]
            raise CheckpointError(f"{folder} {kind} {first if isinstance(first, str) else first[0]}")
    if stored is not None:
        check_index(folder, stored, {*tied, *tied.values()})


def _check_generation(folder: Path) -> None:
    """Refuses generation settings that transformers would leave out without a word."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if path.is_file():
        settings = read_object(path)
        try:
            GenerationConfig.from_dict(settings)
        except Exception as error:  # its checks raise anything
            raise CheckpointError(f"{path} cannot be used: {' '.join(str(error).split()):.200}") from error


def quiet_transformers() -> None:
    """Silences transformers inside the block. Errors are raised in one line, and its warnings would come between."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def implementations(config: Any, dtype: str | None) -> dict[str, str]:
    """Options of ``from_pretrained`` under which the model of ``config`` computes what it should.

    Grouped products of experts know no float64, and before transformers 5.21 sdpa dropped soft-caps without a word.
    """
    double = (dtype or str(config.dtype).removeprefix("torch.")) == "float64"
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    options = {"experts_implementation": "eager"} if double else {}
    return options | ({"attn_implementation": "eager"} if capped else {})


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of ``folder``.

    Raises:
        CheckpointError: it has none, or it needs code from the checkpoint.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise anything, bare Exception included
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
        found = [f"{file.name} is {what}" for file in files if os.path.isfile(file) and (what := stand_in(file))]
        reason = found[0] if found else f"{' '.join(str(error).split()):.200}"
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that exists (without ``overwrite``), is the source, or lies in an unwritable place."""
    if output.resolve() == source.resolve() or source.resolve() in output.resolve().parents:
        raise OutputError(
            f"{output} is the source checkpoint or inside it, and anymla never writes there: choose another -o"
        )
    if output.resolve() in source.resolve().parents:
        raise OutputError(f"{output} holds the source checkpoint {source}: choose another -o")
    check_place(output)
    if os.path.lexists(output) and not overwrite:
        raise OutputError(f"{output} exists: choose another -o, or give --overwrite")
    ours = any((output / name).is_file() for name in ("config.json", "export.json"))
    if output.is_dir() and not output.is_symlink() and any(output.iterdir()) and not ours:
        raise OutputError(f"{output} holds no checkpoint, so --overwrite does not replace it: choose another -o")


def check_place(output: Path) -> None:
    """Refuses an output folder that is a file, has too long a name, or lies in an unwritable place."""
    if os.path.isfile(output):
        raise OutputError(f"{output} is a file: choose another -o")
    if len(os.fsencode(output.name)) > 200:  # the partial folder's name is longer, and a name has 255 bytes at most
        raise OutputError(f"{output} cannot be made: its name is too long")
    parent = next(folder for folder in output.absolute().parents if os.path.exists(folder))
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputError(f"{output} cannot be made: {parent} is not a writable folder")


def parse_size(option: str, size: str) -> int:
    """Bytes of a positive number of KB, MB, GB or TB.

    Raises:
        OutputError: it is none; names ``option``.
    """
    match = re.fullmatch(r"\s*(?=.*[1-9])(\d+(?:\.\d+)?)\s*([KMGT])B\s*", size, re.IGNORECASE)
    if match is None:
        raise OutputError(f"{option} {size} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * 1000 ** (" KMGT".index(match[2].upper())))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``: takes its place when the block ends well, vanishes when it does not.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError

    part = output.absolute().with_name(f".{output.name}.partial-{os.getpid()}")
    old = part.with_name(f".{output.name}.old-{os.getpid()}")
    made = [folder for folder in part.parents if not folder.exists()]  # the deepest first
    held = None
    try:
        clear_abandoned(output.absolute())
        part.mkdir(parents=True)
        held = lock_folder(part)
        yield part
        if output.exists():
            output.rename(old)
        part.rename(output)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{output} could not be written: {' '.join(str(error).split())}; nothing was left there"
        ) from error
    finally:
        unlock(held)
        shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(output):
            old.rename(output)  # stopped between the two renames
        remove(old)
        for folder in made:
            with suppress(OSError):  # not empty: the output is there
                folder.rmdir()


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin writing ``needed`` bytes where the disk has fewer.

    Raises:
        OSError: not enough room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free on the disk")


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, generation settings, licences: all but weights, their account and report, config and card."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".py")
    for file in source.iterdir():
        skip = (
            file.suffix in weights
            or file.name in ("config.json", "README.md", "adapter_config.json", "report.html", ACCOUNT, INDEX)
            or file.name.endswith(".index.json")
        )
        if file.is_file() and not skip and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
        elif file.name == "additional_chat_templates" and file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
    _pin_tokenizer(source, target)


def _pin_tokenizer(source: Path, target: Path) -> None:
    """Names the class that the source's tokenizer resolves to: some go by model_type, which conversion changes."""
    path = target / "tokenizer_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{source / path.name} cannot be read as JSON: {error}") from error
    fields["tokenizer_class"] = type(load_tokenizer(source)).__name__
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

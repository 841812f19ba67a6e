"""Runs any layer method as a step of a recipe: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anymla.architectures.model_spec import spec_of
from anymla.architectures.packed import packing_in, with_packing
from anymla.cards import step_card
from anymla.io.checkpoint import ACCOUNT, check_weights, parse_size, safe_config
from anymla.io.device import machine_memory
from anymla.io.packed import PackedFiles
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.methods.base import Phase, SweptMethod

CARD = "README.md"


def apply(
    method: SweptMethod,
    source: str | Path,
    output: str | Path,
    *,
    progress: Callable[[int, int, dict[str, Any] | str | None], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Runs a layer method over a checkpoint and writes a new one, with the method on its card.

    Args:
        method: what to do.
        source: a checkpoint as :func:`anymla.convert` takes it, or one that it wrote; it is only read.
        output: the folder to write.
        progress: called after each layer with (layers done, layers, what the method says of it), and before them, with
            the name of the pass for the last, after each pass of the survey through a layer.
        note: called with what is kept, where stopped work goes on.

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
        packing = packing_in(located)
        model = with_packing(spec_of(safe_config(plain.folder).to_dict()), packing)
        kept = PackedFiles(located.base) if packing is not None and method.phase == Phase.CACHE else None
        run = Run(
            output=place,
            memory=machine_memory() // 4,
            shard_size=parse_size("", "5GB"),
            packed=kept,
            progress=progress,
            surveyed=progress,
            note=note,
        )
        with swept(method, plain.folder, model, run) as done:
            if rank() == 0:
                before = plain.folder / CARD if (plain.folder / ACCOUNT).is_file() else None
                card = before.read_text(encoding="utf-8") if before is not None and before.is_file() else None
                told = method.told(done.plan)
                (done.folder / CARD).write_text(step_card(method, source, card, told), encoding="utf-8")

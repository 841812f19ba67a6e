"""Runs any layer method as a step: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anymla.architectures.model_spec import spec_of
from anymla.cards import step_card
from anymla.io.checkpoint import check_weights, parse_size, safe_config
from anymla.io.device import machine_memory
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.methods.base import LayerMethod


def apply(
    method: LayerMethod,
    source: str | Path,
    output: str | Path,
    *,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> None:
    """Runs any layer method over a checkpoint and writes a new one, with the method on its card.

    Args:
        method: what to do.
        source: what :func:`convert` takes, or what it wrote.
        output: the folder to write.
        progress: called after each layer with (layers done, layers, what the method says of it).

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    place = Path(os.path.expanduser(output))
    located = locate(source, adapter=method.adapter)
    with plain_source(located, beside=place) as plain:
        check_weights(plain.folder)
        from anymla.sweep.run import Run, swept  # loads torch

        run = Run(output=place, memory=machine_memory() // 4, shard_size=parse_size("", "5GB"), progress=progress)
        with swept(method, plain.folder, spec_of(safe_config(plain.folder).to_dict()), run) as done:
            from anymla.distributed import rank

            if rank() == 0:
                _write_card(done.folder, plain.folder, method)


def _write_card(folder: Path, source: Path, method: LayerMethod) -> None:
    """The source's card, with what ``method`` did below it."""
    path = source / "README.md"
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    (folder / "README.md").write_text(step_card(before, method), encoding="utf-8")

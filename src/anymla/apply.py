"""One step of a recipe: a checkpoint in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from anymla.architectures.model_spec import spec_of
from anymla.cards import step_card
from anymla.errors import RecipeError
from anymla.io.checkpoint import ACCOUNT, check_output, check_weights, safe_config
from anymla.io.device import machine_memory
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.methods.base import LayerMethod, Method
from anymla.methods.mla.settings import MLA
from anymla.methods.tune import Tune

SHARD_BYTES = 5_000_000_000  # as in save_pretrained
CARD = "README.md"


class Progress(Protocol):
    """Called as a step goes on: parts done, parts in all where that is known, and what is to be said of the last."""

    def __call__(self, done: int, total: int | None, detail: str = "") -> None:
        """Takes a part's end."""


def apply(
    step: Method, source: str | Path, output: Path, *, teacher: str | Path, restart: bool, progress: Progress
) -> None:
    """Makes of ``source`` what ``step`` makes of it, at ``output``; goes on where the same call was stopped.

    Args:
        step: the method, with its settings.
        source: a checkpoint as :func:`anymla.convert` takes it; it is only read.
        output: the folder to write.
        teacher: the original, where the step learns from it.
        restart: discard what a stopped call left.
        progress: called as the step goes on.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    if isinstance(step, MLA):
        from anymla.pipeline import convert

        convert(source, output, step, restart=restart, progress=lambda done, total, _: progress(done, total))
    elif isinstance(step, LayerMethod):
        _change_layers(step, source, output, restart, progress)
    elif isinstance(step, Tune):
        from anymla.training.tune import tune

        tune(
            source,
            output,
            teacher=teacher,
            recipe=step,
            restart=restart,
            progress=lambda at: progress(at.step, at.steps),
        )
    else:
        raise RecipeError(f"{step.name} cannot be run")


def _change_layers(method: LayerMethod, source: str | Path, output: Path, restart: bool, progress: Progress) -> None:
    from anymla.distributed import rank
    from anymla.register import register
    from anymla.sweep.run import Run, swept

    def told(done: int, total: int, result: dict[str, Any]) -> None:
        progress(done, total)

    register()
    run = Run(output=output, memory=machine_memory() // 4, shard_size=SHARD_BYTES, restart=restart, progress=told)
    located = locate(str(source), adapter=method.adapter)
    for path in located.paths:
        check_output(output, path, overwrite=False)
    with plain_source(located, beside=output) as plain:
        check_weights(plain.folder)
        model = spec_of(safe_config(plain.folder).to_dict())
        card = plain.folder / CARD if (plain.folder / ACCOUNT).is_file() else None
        with swept(method, plain.folder, model, run) as done:
            if rank() == 0:
                before = card.read_text(encoding="utf-8") if card is not None and card.is_file() else None
                (done.folder / CARD).write_text(step_card(method, source, before), encoding="utf-8")

"""Runs a method over a checkpoint and puts a new checkpoint in the output's place; goes on where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from anymla import __version__
from anymla.account import no_cache, told_lengths
from anymla.architectures.stock_config import config_after
from anymla.data.text import bundled_text, calibration_windows, random_windows
from anymla.distributed import join_processes, rank, wait_for_all, world
from anymla.errors import TextError
from anymla.io.checkpoint import load_tokenizer, safe_config
from anymla.io.computing import Computing
from anymla.io.device import matmul_speed, pick_device
from anymla.io.packed import PackedFiles
from anymla.io.streamed import StreamedModel
from anymla.io.telling import tell
from anymla.io.work import WorkFolder
from anymla.methods.base import Facts, LayerMethod, Plan, Survey, SweptMethod
from anymla.modeling.spec import DTYPE_BYTES, ModelSpec
from anymla.stored_bytes import write_account
from anymla.sweep.checkpoint import write_checkpoint
from anymla.sweep.progress import (
    claim,
    decide_computing,
    fingerprint,
    keep_when_stopped,
    model_hash,
    terminated_as_interrupted,
)
from anymla.sweep.search import run_search
from anymla.sweep.sequence import LayerRecord, Progress, Sequence
from anymla.sweep.survey import Told, run_survey


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a sweep runs.

    Args:
        output: the folder to write.
        memory: bytes of activations to hold in memory, of all processes; shard_size: bytes of a weight file.
        restart: discard what a stopped sweep left.
        progress: called after each layer; surveyed: after each pass through a layer before them.
        faster: given operations per second, says how long a new sweep takes and what is faster, where that is long.
        note: called with that, or with what was kept of stopped work that goes on.
        packed: where the source is a checkpoint of packed weights that was made plain, these.
    """

    output: Path
    memory: int
    shard_size: int
    restart: bool = False
    progress: Progress | None = None
    surveyed: Told | None = None
    faster: Callable[[float], str | None] | None = None
    note: Callable[[str], None] | None = None
    packed: PackedFiles | None = None


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A sweep whose layers are done.

    Args:
        folder: the new checkpoint, which is not yet at the output's place; reports are added to it.
        source: the original; its weights are in its files.
        plan: the final one; records: what became of the layers that are left; spec: what the model now is.
        windows: this process's windows to score on [N,T]; original, converted: their final hidden states [N,T,D].
        tuples: whether layers of this family return tuples.
        computing: what was computed in.
    """

    folder: Path
    source: StreamedModel
    plan: Plan
    records: tuple[LayerRecord, ...]
    spec: ModelSpec
    windows: Tensor
    original: Iterator[Tensor]
    converted: Iterator[Tensor]
    tuples: bool
    computing: Computing


@contextmanager
def swept(
    method: SweptMethod,
    source: Path,
    model: ModelSpec,
    run: Run,
    *,
    choices: tuple[Any, ...] | None = None,
) -> Iterator[Swept]:
    """Runs ``method`` over the checkpoint folder ``source``; after the block its output is complete.

    What is done is kept in a folder beside the output until all is; the same call goes on from there. Under torchrun
    every process takes its part of the calibration text, and the first one writes. ``choices``: those of a plan that
    was made before.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    _check_config(method, source, model)
    plan, windows = method.plan(model, None, choices), _calibration(method, source, model)
    device = join_processes(pick_device(method.device))
    streamed, work = StreamedModel(source, dtype=method.dtype, device=device), WorkFolder(run.output)
    claim(work, lambda: _fingerprint(method, source, plan, windows, device, run), restart=run.restart)
    layers = len(model.layers)
    with keep_when_stopped(work, lambda: _done(work, layers), note=run.note):
        computing = _computing(method, decide_computing(work, streamed.stored_dtype, device, method.dtype))
        streamed.compute_in(computing.dtype)
        if not work.begun:
            _say_how_long(run, device)
        memory, survey = run.memory // world(), method.survey(model, plan)
        facts = []
        if survey is not None:
            facts = run_survey(survey, streamed, model, plan, windows, work, memory=memory, told=run.surveyed)
        if (search := method.search(model)) is not None:
            facts = run_search(method, search, streamed, model, windows, work, memory=memory, told=run.surveyed)
        plan = method.plan(model, facts, plan.choices)
        sequence = Sequence(streamed, model, windows, work, memory=memory)
        sequence.convert(method, plan, shard_size=run.shard_size, progress=run.progress, packed=run.packed)
        done = _swept(sequence, plan, computing)
        if rank() == 0:
            write_checkpoint(streamed, work, model, replace(plan, after=done.spec), shard_size=run.shard_size)
            nothing = no_cache(told_lengths(model))
            write_account(work.model, done.spec, (record.after or nothing for record in done.records))
        yield done
        if rank() == 0:
            work.finish()
        wait_for_all()


def _say_how_long(run: Run, device: str) -> None:
    """Says how long the sweep takes, where somebody asks and it takes long."""
    if run.note is not None and run.faster is not None and (long := run.faster(world() * matmul_speed(device))):
        run.note(long)


def _done(work: WorkFolder, layers: int) -> str:
    """How much is done: layers, and before the first one passes of calibration."""
    if work.progress["layers"] or not (passes := len(work.progress["survey"])):
        return f"{len(work.progress['layers'])} of {layers} layers"
    after = work.progress.get("gradient_after")
    back = "" if after in (None, layers) else f" and {layers - after} backward passes"
    return f"{passes} of {layers} passes of calibration{back}"


def surveyed(
    method: LayerMethod,
    survey: Survey,
    source: Path,
    model: ModelSpec,
    place: Path,
    *,
    memory: int,
    told: Told | None = None,
) -> Facts:
    """What ``survey`` says of the checkpoint folder ``source`` on the calibration text of ``method``; changes nothing.

    Args:
        method: whose plan awaits the facts.
        survey: what is asked.
        source: the original's folder.
        model: its spec.
        place: beside it lies what is not in memory; of the facts, tensors are there too.
        memory: bytes of activations that may be in memory at once.
        told: called after each pass through a layer.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
        OSError: the disk is full or ``place`` cannot be written.
    """
    plan, windows = method.plan(model), _calibration(method, source, model)
    device = pick_device(method.device)
    streamed, work = StreamedModel(source, dtype=method.dtype, device=device), WorkFolder(place)
    claim(work, lambda: {"source": model_hash(source, method.dtype)}, restart=False)
    try:
        with terminated_as_interrupted():
            streamed.compute_in(decide_computing(work, streamed.stored_dtype, device, method.dtype).dtype)
            return run_survey(survey, streamed, model, plan, windows, work, memory=memory, told=told)
    finally:
        work.release()


def _check_config(method: SweptMethod, source: Path, model: ModelSpec) -> None:
    """Refuses a model whose config cannot say what the method may make of it.

    Raises:
        UnsupportedModelError: it cannot; the message names what.
    """
    config = None
    for plan in method.possible(model):
        config = config or safe_config(source)
        config_after(config, model, plan.after, plan.removed)


def _computing(method: SweptMethod, decided: Computing) -> Computing:
    """``decided``, but float32 at least where no text is read: all that layers tell then is how fast rope turns."""
    if isinstance(method, LayerMethod) or DTYPE_BYTES[decided.dtype] >= DTYPE_BYTES["float32"]:
        return decided
    return replace(decided, dtype="float32", reason="rope is read to the last digit")


def _calibration(method: SweptMethod, source: Path, model: ModelSpec) -> Tensor:
    """The calibration text as windows [N,T]; random tokens for a method that reads none."""
    if not isinstance(method, LayerMethod):
        return random_windows(model.vocab_size, model.max_position_embeddings)
    tell("reading the calibration text")
    windows = calibration_windows(
        method.calibration or bundled_text("train"),
        load_tokenizer(source),
        tokens=method.calibration_tokens,
        length=min(method.calibration_length, model.max_position_embeddings),
        seed=method.seed,
    )
    if (largest := int(windows.max())) >= model.vocab_size:
        raise TextError(f"{source}: its tokenizer gives id {largest} but the model has {model.vocab_size} tokens")
    return windows


def _swept(sequence: Sequence, plan: Plan, computing: Computing) -> Swept:
    held_out = sequence.decoder.split.held_out
    records = tuple(record for record in sequence.records if not record.removed)
    layers = tuple(record.spec for record in records)
    return Swept(
        folder=sequence.work.model,
        source=sequence.source,
        plan=plan,
        records=records,
        spec=replace(plan.after, dtype=computing.stored, layers=layers),
        windows=sequence.decoder.windows[held_out],
        original=sequence.streams.original.split(1, held_out),
        converted=sequence.streams.converted.split(1, held_out),
        tuples=sequence.decoder.tuples,
        computing=computing,
    )


def _fingerprint(
    method: SweptMethod, source: Path, plan: Plan, windows: Tensor, device: str, run: Run
) -> dict[str, Any]:
    """What the new weights and their files depend on."""
    tell("checking the weights")
    return {
        "anymla": __version__,
        "--max-shard-size": run.shard_size,
        **fingerprint(
            method,
            plan=[_as_json(choice) for choice in plan.choices],
            device=torch.device(device).type,
            source=model_hash(source, method.dtype),
        ),
        "calibration text": [hashlib.sha256(windows.numpy().tobytes()).hexdigest()],
    }


def _as_json(choice: Any) -> Any:
    return choice.model_dump(mode="json") if isinstance(choice, BaseModel) else choice

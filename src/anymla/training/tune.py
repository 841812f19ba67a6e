"""The step `tune`: checks, stages, and a checkpoint folder like the one that came in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from anymla import __version__
from anymla.account import measure, told_lengths
from anymla.architectures.model_spec import context_of, read_config, spec_of
from anymla.architectures.packed import packing_of, with_packing
from anymla.data.mixture import Texts, check_data, read_texts
from anymla.data.packing import check_packing
from anymla.distributed import join_processes, rank, wait_for_all
from anymla.errors import CheckpointError, RecipeError, TextError
from anymla.io.checkpoint import check_output, copy_companions, load_model, load_tokenizer
from anymla.io.device import pick_device
from anymla.io.find import find_model, with_revision
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.io.work import WorkFolder
from anymla.methods.tune import Tune
from anymla.modeling.spec import KEY, OLD_KEY
from anymla.report.tuning import tuning_page
from anymla.settings import DtypeName
from anymla.stored_bytes import write_account
from anymla.sweep.progress import claim, decide_computing
from anymla.training.logs import Keep, Metrics, Place, Progress, TuneProgress, read_metrics, rewind_metrics
from anymla.training.outcome import Quality, Recovery
from anymla.training.packed import check_packed, pack_again, unpacked
from anymla.training.resume import done_steps, keep_steps_when_stopped, tuning_fingerprint
from anymla.training.stages import Stage, check_device, make_stages, mixed, run_stage, training_arguments
from anymla.training.tuned_card import tuned_card

REPORTERS = ("tensorboard", "trackio")


def tune(
    converted: str | Path,
    output: str | Path,
    *,
    teacher: str | Path,
    recipe: Tune | None = None,
    overwrite: bool = False,
    restart: bool = False,
    report_to: list[str] | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **settings: Any,
) -> Recovery:
    """Trains a converted model until it gives what the original gave, and writes it to ``output``.

    Args:
        converted: a local folder or hub id (also ``org/name@revision``) of a model that anymla converted; it is only
            read.
        output: the folder to write; loads as ``converted`` does.
        teacher: the original, a folder, a GGUF file, an adapter's folder or a hub id (``org/name@revision``).
        recipe: settings to start from. Default: the default recipe.
        overwrite: replace ``output`` if it exists.
        restart: discard what a stopped tuning to ``output`` left, instead of going on from there.
        report_to: 'tensorboard' and 'trackio', beside metrics.jsonl and a plot, which are always written.
        revision: of ``converted`` on the hub, a branch, tag or commit.
        adapter: a peft adapter to merge into the teacher.
        progress: called with :class:`TuneProgress` after each step, and once before the first where a stopped tuning
            goes on.
        note: called with what was done to a teacher that is no plain folder, and to settings, in words.
        settings: fields of :class:`Tune` that override the recipe, as ``data="my-text.txt"``.

    Checkpoints are kept in a folder beside ``output`` until all is done; the same call goes on from the last one. Under
    torchrun or `accelerate launch` every process takes its part of each step, and the first one writes.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    started, place = time.monotonic(), Path(os.path.expanduser(output))
    base = {} if recipe is None else recipe.model_dump(exclude_unset=True)
    tuning = Tune.of(base | settings, "settings")
    _check_early(tuning, report_to)
    source, student = locate(teacher, adapter=adapter), find_model(with_revision(converted, revision))
    for path in (student, *source.paths):
        check_output(place, path, overwrite=overwrite)
    with plain_source(source, beside=place) as plain, unpacked(student, tuning) as learner:
        if note is not None:
            for text in plain.notes:
                note(f"{teacher}: {text}")
        run = _prepared(student, learner, plain.folder, tuning, note)
        work = WorkFolder(place, kind="tuning", counted=("checkpoints",))
        claim(work, lambda: tuning_fingerprint(student, plain.folder, run.tuning), restart=restart)
        with keep_steps_when_stopped(work, run.stages, run.tuning):
            run.all_stages(work, progress, _reporters(report_to, work.model))
            report = _report(work, place, run, started)
            if rank() == 0:
                pack_again(student, learner, work.model)
                _write_report(work.model, student, str(teacher), report)
                work.finish()
            wait_for_all()
    return report


def _prepared(student: Path, learner: Path, teacher: Path, tuning: Tune, note: Callable[[str], None] | None) -> _Run:
    """What all stages need, once it is known that the models belong together and that the texts are enough.

    ``learner``: the student itself, or where its packed weights stand as numbers.
    """
    check_pair(student, teacher, tuning)
    tuning = _by_logits_where_layers_differ(tuning, student, teacher, note)
    tokenizer = load_tokenizer(student)
    length = min(tuning.length, context_of(student) or tuning.length)
    stages = make_stages(tuning, length, int(os.environ.get("WORLD_SIZE", "1")))
    texts = read_texts(
        tuning.data or (), tokenizer, length, held_out=tuning.eval_data, held_out_tokens=tuning.eval_tokens
    )
    device = join_processes(pick_device(tuning.device))
    return _Run(learner, teacher, tuning, stages, texts, tokenizer, device.partition(":")[0])


def _by_logits_where_layers_differ(
    tuning: Tune, student: Path, teacher: Path, note: Callable[[str], None] | None
) -> Tune:
    """``tuning`` without its loss of layers, where the student has fewer of them, or learns in all parts of them."""
    if tuning.learns_zeros:
        return tuning.model_copy(update={"layerwise": 0.0})
    if not tuning.layerwise or _layers(student) >= _layers(teacher):
        return tuning
    if note is not None:
        note("the model has fewer layers than its original: tuning goes by logits alone, as with layerwise 0")
    return tuning.model_copy(update={"layerwise": 0.0})


def check_pair(student: Path, teacher: Path, tuning: Tune) -> None:
    """Refuses a model that no step of anymla made another one, and a teacher that cannot be its original.

    Raises:
        CheckpointError: which of them, and why.
    """
    ours, theirs = read_config(student), read_config(teacher)
    check_packed(student, ours, tuning)
    stock = not str(ours.get("model_type")).startswith("anymla_") or not {KEY, OLD_KEY} & ours.keys()
    if stock and (ours.get("model_type") != theirs.get("model_type") or _sizes(ours) == _sizes(theirs)):
        raise CheckpointError(
            f"{student} was not converted by anymla, so it lost nothing that tuning could bring back: first anymla "
            f"convert {student} -o CONVERTED"
        )
    family = str(ours["model_type"]).removeprefix("anymla_")
    if theirs.get("model_type") != family:
        raise CheckpointError(
            f"--teacher {teacher} is a {theirs.get('model_type')!s:.40} and {student} was a {family}: "
            "give the model it was converted from"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        fewer = name == "num_hidden_layers" and _layers(student) < _layers(teacher)
        if name in theirs and ours.get(name, theirs[name]) != theirs[name] and not fewer:
            raise CheckpointError(
                f"--teacher {teacher} has a {name} of {theirs[name]!s:.20} and {student} one of {ours[name]!s:.20}: "
                "give the model it was converted from"
            )


def _sizes(config: dict[str, Any]) -> tuple[Any, int, int]:
    """What a step may change of a stock model."""
    spec = spec_of(config)
    return spec.layers, spec.intermediate_size, spec.routed_experts


def _layers(folder: Path) -> int:
    return len(spec_of(read_config(folder)).layers)


@dataclass(frozen=True)
class _Run:
    """What all stages have in common."""

    student: Path
    original: Path
    tuning: Tune
    stages: list[Stage]
    texts: Texts
    tokenizer: Any
    device: str

    def all_stages(self, work: WorkFolder, progress: Progress | None, reporters: list[TrainerCallback]) -> None:
        """Runs the stages that ``work`` does not hold yet; the last one's result is ``work.model``."""
        teacher = self._teacher(work)
        done, before, student = done_steps(work, self.stages), 0, self.student
        if rank() == 0:
            rewind_metrics(work.model, done)
        steps = sum(stage.steps for stage in self.stages)
        if progress is not None and done and rank() == 0:
            tokens = done * self.stages[0].step_tokens
            progress(TuneProgress(stage="", step=done, steps=steps, tokens=tokens, loss=None))
        for number, stage in enumerate(self.stages):
            last = number == len(self.stages) - 1
            folder = work.path / stage.name
            output = work.model if last else folder / "model"
            if done < before + stage.steps or last:
                at = max(0, done - before)
                resume = folder / f"checkpoint-{at}" if at else None
                place = Place(stage.name, before, steps, stage.step_tokens)
                callbacks = [Metrics(work.model, place, progress), Keep(work, stage.name), *reporters]
                self._stage(student, teacher, stage, folder, resume, callbacks, output)
            student, before = output, before + stage.steps

    def _stage(
        self,
        student: Path,
        teacher: Any,
        stage: Stage,
        folder: Path,
        resume: Path | None,
        callbacks: list[TrainerCallback],
        output: Path,
    ) -> None:
        hidden = int(teacher.config.get_text_config().hidden_size)
        arguments = training_arguments(self.tuning, stage, folder, device=self.device, hidden=hidden)
        arguments.eval_on_start = stage is self.stages[0] and resume is None
        if self.tuning.parallel != "fsdp":
            teacher = teacher.to(arguments.device)
        run_stage(
            student,
            teacher,
            self.texts,
            self.tokenizer,
            self.tuning,
            stage,
            arguments,
            resume=resume,
            callbacks=callbacks,
            output=output,
        )

    def _teacher(self, work: WorkFolder) -> Any:
        """The original, once it is known that texts fit it and that packed documents stay apart in it."""
        low = mixed(self.tuning, self.device) or self.tuning.precision == "bfloat16"
        asked: DtypeName | None = "bfloat16" if low else None
        teacher = load_model(self.original, dtype=asked)
        computing = decide_computing(work, str(teacher.dtype).removeprefix("torch."), self.device, asked)
        if computing.dtype != computing.stored:
            teacher = teacher.to(getattr(torch, computing.dtype))
        size = int(teacher.config.get_text_config().vocab_size)
        if (largest := int(self.texts.held_out.max())) >= size:
            raise TextError(f"--data: the tokenizer gives id {largest} but the model has {size} tokens")
        if self.tuning.packing:
            check_packing(teacher)
        return teacher


def _check_early(tuning: Tune, report_to: list[str] | None) -> None:
    """Refuses texts, a device and reporters that are not there, before any model is read.

    Raises:
        RecipeError, TextError: names the option.
    """
    from transformers.integrations import integration_utils

    check_data(tuning.data, tuning.eval_data)
    check_device(tuning.device)
    pick_device(tuning.device)
    for name in report_to or []:
        if name not in REPORTERS:
            raise RecipeError(f"--report-to {name} is not one of {', '.join(REPORTERS)}")
        if not getattr(integration_utils, f"is_{name}_available")():
            raise RecipeError(f"--report-to {name} is not installed: pip install {name}")


def _reporters(names: list[str] | None, folder: Path) -> list[TrainerCallback]:
    """Transformers' own callbacks for ``names``."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if "tensorboard" in (names or []):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
    return [INTEGRATION_TO_CALLBACK[name]() for name in names or []]


def _report(work: WorkFolder, output: Path, run: _Run, started: float) -> Recovery:
    lines = [line for line in read_metrics(work.model) if "eval_perplexity" in line]
    first, last = lines[0], lines[-1]
    return Recovery(
        output=output,
        tuning=run.tuning,
        before=Quality(perplexity=first["eval_perplexity"], kl=first["eval_kl"]),
        after=Quality(perplexity=last["eval_perplexity"], kl=last["eval_kl"]),
        original_perplexity=last["original_perplexity"],
        tokens=last["tokens"],
        steps=sum(stage.steps for stage in run.stages),
        seconds=time.monotonic() - started,
        anymla_version=__version__,
    )


def _write_report(folder: Path, student: Path, teacher: str, report: Recovery) -> None:
    """Writes all that lies beside the weights."""
    copy_companions(student, folder)
    (folder / "tuning.yaml").write_text(report.tuning.to_yaml(), encoding="utf-8")
    (folder / "tuning.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    card = ""
    with suppress(OSError, UnicodeDecodeError):
        card = (student / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(tuned_card(card, report), encoding="utf-8")
    config = read_config(folder)
    spec = with_packing(spec_of(config), packing_of(config))
    write_account(folder, spec, measure(load_model(folder), told_lengths(spec)).layers)
    tuning_page(report, folder, teacher, read_metrics(folder)).write(folder)

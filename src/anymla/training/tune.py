"""The step `tune`: checks, stages, and a checkpoint folder like the one that came in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from anymla import __version__
from anymla.account import measure, told_lengths
from anymla.architectures.model_spec import context_of, read_config, spec_of
from anymla.architectures.packed import packing_of, with_packing
from anymla.data.mixture import read_texts, tokens_of_a_pass
from anymla.distributed import join_processes, rank, wait_for_all
from anymla.io.checkpoint import check_output, copy_companions, load_model, load_tokenizer
from anymla.io.device import pick_device
from anymla.io.find import find_model, with_revision
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.io.work import WorkFolder
from anymla.methods.tune import Tune
from anymla.report.tuning import tuning_page
from anymla.stored_bytes import write_account
from anymla.sweep.progress import claim
from anymla.training.early_checks import check_early, reporters
from anymla.training.logs import Progress, read_metrics, scored_in
from anymla.training.outcome import Quality, Recovery
from anymla.training.packed import pack_again, unpacked
from anymla.training.pair_checks import by_logits_where_layers_differ, check_pair
from anymla.training.resume import keep_steps_when_stopped, tuning_fingerprint
from anymla.training.run import Run
from anymla.training.stages import LOGITS, make_stages
from anymla.training.tuned_card import tuned_card

PASSES, MOST_TOKENS = 30, 4_000_000  # by default: over local text, and at most
REDRAWN = 0.5  # by default, of text that is read more than once
PATIENCE = 3  # scorings without a better one that end a run of as many passes


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
    check_early(tuning, report_to)
    source, student = locate(teacher, adapter=adapter), find_model(with_revision(converted, revision))
    for path in (student, *source.paths):
        check_output(place, path, overwrite=overwrite)
    with plain_source(source, beside=place) as plain, unpacked(student, tuning) as learner:
        if note is not None:
            for text in plain.notes:
                note(f"{teacher}: {text}")
        run = _prepared(student, learner, plain.folder, tuning, note)
        work = WorkFolder(place, kind="tuning", counted=("trials", "checkpoints"))
        claim(work, lambda: tuning_fingerprint(student, plain.folder, run.tuning), restart=restart)
        with keep_steps_when_stopped(work, run.stages, run.tuning):
            tuned_by = run.all_stages(work, progress, reporters(report_to, work.model))
            report = _report(work, place, tuned_by, started)
            if rank() == 0:
                pack_again(student, learner, work.model)
                _write_report(work.model, student, str(teacher), report)
                work.finish()
            wait_for_all()
    return report


def _prepared(student: Path, learner: Path, teacher: Path, tuning: Tune, note: Callable[[str], None] | None) -> Run:
    """What all stages need, once it is known that the models belong together and that the texts are enough.

    ``learner``: the student itself, or where its packed weights stand as numbers.
    """
    check_pair(student, teacher, tuning)
    tuning = by_logits_where_layers_differ(tuning, student, teacher, note)
    tokenizer = load_tokenizer(student)
    length = min(tuning.length, context_of(student) or tuning.length)
    texts = read_texts(
        tuning.data or (), tokenizer, length, held_out=tuning.eval_data, held_out_tokens=tuning.eval_tokens
    )
    a_pass = tokens_of_a_pass(texts, tokenizer, length, tuning.tokens or MOST_TOKENS)
    if tuning.tokens is None:
        tuning = _as_long_as_it_helps(tuning, a_pass, note)
    if tuning.redraw is None:
        repeats = a_pass is not None and int(tuning.tokens or 0) > a_pass
        tuning = tuning.model_copy(update={"redraw": REDRAWN if repeats and not tuning.cross_entropy else 0.0})
    stages = make_stages(tuning, int(tuning.tokens or 0), length, int(os.environ.get("WORLD_SIZE", "1")))
    device = join_processes(pick_device(tuning.device))
    return Run(learner, teacher, tuning, stages, texts, tokenizer, device.partition(":")[0])


def _as_long_as_it_helps(tuning: Tune, a_pass: int | None, note: Callable[[str], None] | None) -> Tune:
    """``tuning`` with as many tokens as may help, and an end where they help no more.

    ``a_pass``: the tokens of its data; None where nobody knows.
    """
    tokens = MOST_TOKENS if a_pass is None else max(256, min(PASSES * a_pass, MOST_TOKENS))
    if note is not None:
        passes = "" if a_pass is None else f", {tokens / a_pass:.3g} passes over the data"
        note(f"up to {tokens:,} tokens{passes}, as long as scores become better; --tokens sets another limit")
    return tuning.model_copy(update={"tokens": tokens, "early_stop": tuning.early_stop or PATIENCE})


def _report(work: WorkFolder, output: Path, tuning: Tune, started: float) -> Recovery:
    lines = scored_in(read_metrics(work.model), LOGITS)
    first, last, best = lines[0], lines[-1], min(lines, key=lambda line: float(line[tuning.scored_by]))
    return Recovery(
        output=output,
        tuning=tuning,
        before=Quality(perplexity=first["eval_perplexity"], kl=first["eval_kl"]),
        after=Quality(perplexity=best["eval_perplexity"], kl=best["eval_kl"]),
        original_perplexity=last["original_perplexity"],
        tokens=last["tokens"],
        steps=last["step"],
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

"""`anymla run`: a recipe's steps one after the other, each from an ordinary checkpoint to the next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anymla import __version__, pipeline
from anymla.errors import AnymlaError, OutputError, RecipeError
from anymla.io.checkpoint import check_output
from anymla.io.device import pick_device
from anymla.io.sources.locate import Located, locate
from anymla.io.work import WorkFolder
from anymla.layer_steps import apply
from anymla.methods.base import SweptMethod
from anymla.methods.mla.settings import MLA
from anymla.methods.tune import Tune
from anymla.recipe import Recipe, read_recipe
from anymla.run_outcome import Quality, RunReport, StepOutcome, original_cost, source_spec, step_cost
from anymla.run_work import finish, kept, step_folder

Progress = Callable[..., None]  # (number of a step, the step, and what its own progress is given)
Note = Callable[[str], None]


def run(
    model: Recipe | str | Path | None,
    output: str | Path,
    steps: Sequence[Any] | None = None,
    *,
    recipe: str | Path | None = None,
    teacher: str | Path | None = None,
    text: str | Path | None = None,
    context: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    keep_steps: bool = False,
    progress: Progress | None = None,
    told: Callable[[int, StepOutcome], None] | None = None,
    note: Note | None = None,
) -> RunReport:
    """Runs the steps of a recipe, and writes the last one's checkpoint to ``output``.

    Args:
        model: what the first step takes, as :func:`anymla.convert` does; or a whole recipe.
        output: the folder to write; ``run.json``, ``recipe.yaml`` and ``account.json`` lie beside the weights.
        steps: names of steps, ``{"mla": {"kv_cache": 0.25}}``, or objects such as ``MLA(kv_cache=0.25)``.
        recipe: in place of steps, a YAML file or the name of a recipe that comes with anymla; ``model``, ``teacher``,
            ``text`` and ``context`` replace what it says.
        teacher: the original, where the model is not it.
        text: score the original and the model after every step on this text.
        context: tokens at which the cache's size is told.
        overwrite: replace ``output`` if it exists.
        restart: discard what a stopped run to ``output`` left, instead of going on from there.
        keep_steps: keep the checkpoints between the steps, in a folder ``OUTPUT-steps``.
        progress: called with a step's number, from 1, and the step when it begins; then with these and what
            :func:`anymla.convert`, :func:`anymla.tune` or ``layer_steps.apply`` give their ``progress``.
        told: called with 0 and the original's outcome, then after each step with its number and outcome.
        note: called with what the user should know, in words.

    What is done is kept in a folder beside ``output``: the same call goes on inside the step that was stopped.

    Raises:
        AnymlaError: one of its kinds, each one clear line. What a step refuses is told before any weight is read.
    """
    place = Path(os.path.expanduser(output))
    chosen = _chosen(model, steps, recipe, {"teacher": teacher, "text": text, "context": context})
    original = chosen.teacher or chosen.model
    adapter = next((step.adapter for step in chosen.steps if isinstance(step, MLA)), None)
    chosen.plan(source_spec(locate(str(chosen.model), adapter=adapter, config_only=True)))
    _check_steps(chosen)
    source, taught_by = locate(str(chosen.model), adapter=adapter), locate(str(original), adapter=adapter)
    for path in (*source.paths, *taught_by.paths):
        check_output(place, path, overwrite=overwrite)
    kept = place.absolute().with_name(f"{place.name}-steps") if keep_steps else None
    if kept is not None and os.path.lexists(kept) and not overwrite:
        raise OutputError(f"{kept} exists: choose another -o, or give --overwrite")
    return _Run(chosen, place, taught_by, adapter, kept, progress, told, note).all_steps(_source_facts(source), restart)


def _chosen(
    model: Recipe | str | Path | None, steps: Sequence[Any] | None, recipe: str | Path | None, given: dict[str, Any]
) -> Recipe:
    """The whole recipe, with the arguments in place of what it says.

    Raises:
        RecipeError: no model, no steps, or several of them.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if (steps is not None) + (recipe is not None) + isinstance(model, Recipe) != 1:
        raise RecipeError("give one of a recipe and the steps to run, as [{'mla': {'kv_cache': 0.25}}, 'tune']")
    if isinstance(model, Recipe):
        chosen = Recipe.of(model.model_dump(exclude={"steps"}) | {"steps": model.steps} | changes)
    elif recipe is not None:
        chosen = read_recipe(recipe, model=model, **changes)
    else:
        chosen = Recipe.of({"model": model, "steps": list(steps or ())} | changes, "steps")
    if chosen.model is None:
        raise RecipeError("the recipe names no model: give --model")
    return chosen


def _check_steps(recipe: Recipe) -> None:
    """Finds texts and devices of all steps before hours of work need them.

    Raises:
        TextError, RecipeError: one is not there; the message names the step.
    """
    from anymla.data.mixture import check_data
    from anymla.data.text import check_texts

    check_texts({"text": recipe.text})
    for number, step in enumerate(recipe.steps, 1):
        try:
            pick_device(getattr(step, "device", "auto"))
            if isinstance(step, Tune):
                check_data(step.data, step.eval_data)
            check_texts({"calibration": getattr(step, "calibration", None)})
        except AnymlaError as error:
            raise type(error)(f"step {number}, {step.name}: {error}") from error


def _source_facts(source: Located) -> list[Any]:
    """What tells one source from another without reading its weights: steps themselves hash all that they read."""
    files = [
        file for path in source.paths for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))
    ]
    configs = [(path / name) for path in source.paths for name in ("config.json", "adapter_config.json")]
    texts = [path.read_text(encoding="utf-8") for path in configs if path.is_file()]
    return [*texts, *([file.name, file.stat().st_size] for file in files)]


@dataclass(frozen=True)
class _Run:
    """One run: its recipe, where it goes, the original, where steps are kept, and whom it tells."""

    recipe: Recipe
    output: Path
    original: Located
    adapter: str | None
    kept: Path | None
    progress: Progress | None
    told: Callable[[int, StepOutcome], None] | None
    note: Note | None

    def all_steps(self, source: list[Any], restart: bool) -> RunReport:
        """Does what the work folder does not hold yet, and puts the last checkpoint in the output's place."""
        from anymla.distributed import join_processes, rank, wait_for_all
        from anymla.sweep.progress import claim

        started = time.monotonic()
        join_processes(pick_device(getattr(self.recipe.steps[0], "device", "auto")))
        work = WorkFolder(self.output, kind="run", counted=("steps",))
        claim(work, lambda: self._fingerprint() | {"source": source}, restart=restart)
        with kept(work, len(self.recipe.steps)):
            if not work.progress.get("finishing"):
                self._go_on(work)
            outcomes = [StepOutcome.of(outcome) for outcome in work.progress["outcomes"]]
            report = RunReport(
                output=self.output,
                recipe=self.recipe,
                original=outcomes[0],
                steps=tuple(outcomes[1:]),
                seconds=time.monotonic() - started,
            )
            if rank() == 0:
                finish(work, report, self.kept)
            wait_for_all()
        return report

    def _fingerprint(self) -> dict[str, Any]:
        """What the new weights depend on, beside the source."""
        steps = {
            f"step {number}": {"name": step.name, **step.model_dump(mode="json")}
            for number, step in enumerate(self.recipe.steps, 1)
        }
        return {"anymla": __version__, "steps": len(steps), "teacher": self.original.name, **steps}

    def _go_on(self, work: WorkFolder) -> None:
        """Does the steps whose checkpoints ``work`` lacks; tells what the model is after each."""
        from anymla.distributed import rank

        told_of = [self.recipe.text, self.recipe.text_tokens, self.recipe.context]
        outcomes = work.progress.get("outcomes", []) if work.progress.get("told_of") == told_of else []

        def keep() -> None:
            if rank() == 0:
                work.commit(steps=[step.name for step in self.recipe.steps], outcomes=outcomes, told_of=told_of)
            work.progress["outcomes"] = outcomes

        keep()
        for number in range(len(self.recipe.steps) + 1):
            began = time.monotonic()
            if number and not step_folder(work, self.recipe, number).is_dir():
                self._step(work, number)
            if number == len(outcomes):
                outcomes.append(self._outcome(work, number, time.monotonic() - began))
                keep()
            if self.told is not None and rank() == 0:
                self.told(number, StepOutcome.of(outcomes[number]))

    def _step(self, work: WorkFolder, number: int) -> None:
        """Makes one step's checkpoint of the one before it."""
        step, folder = self.recipe.steps[number - 1], step_folder(work, self.recipe, number)
        source = str(self.recipe.model) if number == 1 else step_folder(work, self.recipe, number - 1)

        def progress(*told: Any) -> None:
            if self.progress is not None:
                self.progress(number, step, *told)

        progress()
        try:
            if isinstance(step, MLA):
                origin = None if number == 1 else str(self.recipe.model)
                done = pipeline.convert(source, folder, step, origin=origin, progress=progress, notify=self.note)
                self._note(note for note in done.notes if note != pipeline.EARLIER)
            elif isinstance(step, Tune):
                from anymla.training.tune import tune

                teacher = self.original.name
                tune(
                    source,
                    folder,
                    teacher=teacher,
                    adapter=self.adapter,
                    recipe=step,
                    progress=progress,
                    note=self.note,
                )
            elif isinstance(step, SweptMethod):
                apply(step, source, folder, progress=progress, note=self.note)
            else:
                raise RecipeError(f"{step.name} cannot be run")
        except AnymlaError as error:
            raise type(error)(f"step {number}, {step.name}: {error}") from error

    def _note(self, texts: Iterable[str]) -> None:
        """Tells each of ``texts``."""
        if self.note is not None:
            for text in texts:
                self.note(text)

    def _outcome(self, work: WorkFolder, number: int, seconds: float) -> dict[str, Any]:
        """What the model is after a step, or before the first one; the same in all processes."""
        from anymla.distributed import first_decides, rank

        if rank() != 0:
            return dict(first_decides(None))
        if number == 0:
            cost = original_cost(self.original, self.recipe.context)
            name, settings, folder = "original", {}, None
        else:
            step, folder = self.recipe.steps[number - 1], step_folder(work, self.recipe, number)
            name, settings, cost = step.name, step.model_dump(mode="json"), step_cost(folder, self.recipe.context)
        quality = self._quality(folder)
        outcome = StepOutcome(name=name, settings=settings, account=cost, quality=quality, seconds=seconds)
        return dict(first_decides(asdict(outcome)))

    def _quality(self, folder: Path | None) -> Quality | None:
        """Scores of a step's checkpoint against the original, or of the original."""
        if self.recipe.text is None:
            return None
        from anymla.evaluation.evaluate import evaluate

        against = None if folder is None else self.original.name
        scores = evaluate(
            folder or self.original.name,
            self.recipe.text,
            against,
            tokens=self.recipe.text_tokens,
            device=getattr(self.recipe.steps[0], "device", "auto"),
            adapter=self.adapter,
        )
        return Quality(**{name: getattr(scores, name) for name in Quality.__dataclass_fields__})

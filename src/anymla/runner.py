"""`anymla run`: the steps of a recipe, one after the other; between them lie ordinary checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anymla import __version__
from anymla.architectures.model_spec import read_config, spec_of
from anymla.errors import OutputError, RecipeError
from anymla.io.checkpoint import ACCOUNT, check_output
from anymla.io.sources.locate import Located, locate
from anymla.io.work import lock_folder, replace_folder, write_json
from anymla.methods.base import Method
from anymla.recipe import Recipe, read_recipe

PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """How far a run is: ``done`` of ``total`` parts of the step ``name``, the ``step``-th of ``steps``."""

    step: int
    steps: int
    name: str
    done: int
    total: int | None
    detail: str = ""


Progress = Callable[[StepProgress], None]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step made: its settings, the model's bytes, its quality where there is a text, and the seconds it took.

    ``account``: as in account.json, with ``cache_bytes_at_context``. ``quality``: perplexity, and KL and top-1
    agreement to the original.
    """

    name: str
    settings: dict[str, Any]
    account: dict[str, Any]
    quality: dict[str, Any] | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a run made: where the model is, and the original and every step."""

    output: Path
    recipe: Recipe
    context: int
    steps: tuple[StepOutcome, ...]
    anymla_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return {
            "output": str(self.output),
            "recipe": self.recipe.to_dict(),
            "context": self.context,
            "steps": [asdict(step) for step in self.steps],
            "anymla_version": self.anymla_version,
        }


def run(
    model: str | Path | Recipe | None,
    output: str | Path,
    steps: Sequence[Any] | None = None,
    *,
    recipe: str | Path | None = None,
    teacher: str | Path | None = None,
    text: str | Path | None = None,
    text_tokens: int | None = None,
    context: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    keep_steps: bool = False,
    progress: Progress | None = None,
    done: Callable[[StepOutcome], None] | None = None,
) -> RunOutcome:
    """Runs the steps of a recipe on a model and writes what the last one makes to ``output``.

    Args:
        model: a checkpoint as :func:`anymla.convert` takes it, or a whole recipe.
        output: the folder to write.
        steps: names of steps, or names with settings, as ``[{"mla": {"kv_cache": 0.25}}, "tune"]``.
        recipe: instead of steps, a YAML file or the name of a recipe that comes with anymla.
        teacher: the original, where ``model`` is not it.
        text: what to score the model on after every step.
        text_tokens: read at most this many tokens of it.
        context: tokens at which the cache's size is told.
        overwrite: replace ``output`` if it exists.
        restart: discard what a stopped run to ``output`` left, instead of going on from there.
        keep_steps: keep the checkpoints between the steps, in the folder ``output`` with ``-steps`` after its name.
        progress: called as the steps go on.
        done: called with the original, as step 0, and after every step.

    Raises:
        AnymlaError: one of its kinds, each one clear line; what the config decides is refused before weights are read.
    """
    place = Path(os.path.expanduser(output))
    given = {"teacher": teacher, "text": text, "text_tokens": text_tokens, "context": context}
    chosen = _chosen(model, steps, recipe, {name: value for name, value in given.items() if value is not None})
    source = locate(str(chosen.model))
    for path in source.paths:
        check_output(place, path, overwrite=overwrite)
    config = read_config(source.base) if source.gguf is None else source.gguf.config
    spec = spec_of(config)
    chosen.plan(spec)
    if chosen.teacher is None and any(layer.latent is not None for layer in spec.layers):
        raise RecipeError(f"{chosen.model} was converted already: give its original as --teacher")
    held = chosen.context or spec.max_position_embeddings
    work = _Work(place, {"recipe": chosen.to_dict(), "model": _identity(source), "anymla": __version__})
    with work.opened(restart=restart):
        runner = _Runner(chosen, work, held, restart, progress)
        outcomes = runner.run(done)
        report = RunOutcome(output=place, recipe=chosen, context=held, steps=tuple(outcomes))
        last = work.step(len(chosen.steps), chosen.steps[-1])
        write_json(last / "run.json", report.to_dict())
        (last / "recipe.yaml").write_text(chosen.to_yaml(), encoding="utf-8")
        work.finish(last, keep_steps=keep_steps)
    return report


def _chosen(
    model: str | Path | Recipe | None, steps: Sequence[Any] | None, recipe: str | Path | None, given: dict[str, Any]
) -> Recipe:
    """The whole recipe, checked.

    Raises:
        RecipeError: no model, no steps, or several of them.
    """
    if isinstance(model, Recipe):
        return Recipe.of({**model.to_dict(), "steps": model.steps, **given})
    if (steps is None) == (recipe is None):
        raise RecipeError("give the steps to run, or a recipe that has them: --step 'mla: {kv_cache: 0.25}'")
    if recipe is not None:
        chosen = read_recipe(recipe, model=model, **given)
    else:
        chosen = Recipe.of({"model": model, "steps": list(steps or ()), **given}, "--step")
    if chosen.model is None:
        raise RecipeError("no model is named: give one as MODEL, --model, or in the recipe")
    return chosen


def _identity(source: Located) -> dict[str, Any]:
    """What tells one source from another without reading its weights: names, sizes, and the config's hash."""
    files = sorted(path for base in source.paths for path in ([base] if base.is_file() else base.iterdir()))
    config = hashlib.sha256(json.dumps(source.gguf.config if source.gguf else read_config(source.base)).encode())
    return {"config": config.hexdigest(), "files": [[file.name, file.stat().st_size] for file in files]}


class _Work:
    """``.OUT.steps`` beside OUT: a folder per step, and progress.json with what is done."""

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        self.output, self.fingerprint = output.absolute(), json.loads(json.dumps(fingerprint))
        self.folder = self.output.with_name(f".{output.name}.steps")
        self.outcomes: list[StepOutcome] = []

    def step(self, number: int, method: Method) -> Path:
        """The checkpoint that a step makes, under the name that the output will have."""
        return self.folder / f"{number}-{method.name}" / self.output.name

    @contextmanager
    def opened(self, *, restart: bool) -> Iterator[None]:
        """Takes up what a stopped run left, or begins; where a run leaves nothing to go on from, nothing stays.

        Raises:
            OutputError: another run is at work there, or one with other settings was stopped there.
        """
        made = [folder for folder in self.folder.parents if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock_folder(self.folder)
        except OSError as error:
            raise OutputError(f"{self.output} is being written by another run: wait, or choose -o") from error
        try:
            self._take_up(restart)
            yield
        finally:
            os.close(held)
            self._clear(made)

    def _take_up(self, restart: bool) -> None:
        path = self.folder / PROGRESS
        if restart:
            for child in self.folder.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if kept is not None and kept["fingerprint"] != self.fingerprint:
            raise OutputError(
                f"{self.folder} holds a run that was stopped and had another recipe or model: the command that began "
                "it goes on, --restart discards it"
            )
        self.outcomes = [StepOutcome(**outcome) for outcome in (kept or {"steps": []})["steps"]]
        self._write()

    def commit(self, outcome: StepOutcome) -> None:
        """Counts a step as done."""
        self.outcomes.append(outcome)
        self._write()

    def _write(self) -> None:
        write_json(
            self.folder / PROGRESS,
            {"fingerprint": self.fingerprint, "steps": [asdict(outcome) for outcome in self.outcomes]},
        )

    def finish(self, last: Path, *, keep_steps: bool) -> None:
        """The last step's checkpoint takes the output's place."""
        replace_folder(last, self.output)
        if keep_steps:
            (self.folder / PROGRESS).unlink()
            shutil.rmtree(last.parent)
            replace_folder(self.folder, self.output.with_name(f"{self.output.name}-steps"))
        else:
            shutil.rmtree(self.folder)

    def _clear(self, made: list[Path]) -> None:
        """Removes the folder where no step has left anything in it."""
        if not self.folder.is_dir() or any(any(child.iterdir()) for child in self.folder.iterdir() if child.is_dir()):
            return
        shutil.rmtree(self.folder)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


class _Runner:
    """The steps of one run, those that are done already left out."""

    def __init__(self, recipe: Recipe, work: _Work, context: int, restart: bool, progress: Progress | None) -> None:
        self.recipe, self.work, self.context, self.restart = recipe, work, context, restart
        self.progress = progress
        self.teacher = str(recipe.teacher or recipe.model)

    def run(self, done: Callable[[StepOutcome], None] | None) -> list[StepOutcome]:
        """Runs what is left of the steps; returns what all of them made."""
        source = str(self.recipe.model)
        for number, step in enumerate(self.recipe.steps, 1):
            target = self.work.step(number, step)
            if number > len(self.work.outcomes):
                began = time.monotonic()
                if not target.exists():  # else it was stopped after the step, before it was counted
                    target.parent.mkdir(exist_ok=True)
                    self._apply(number, step, source, target)
                self.work.commit(self._outcome(step, target, time.monotonic() - began))
            if done is not None:
                done(self.work.outcomes[number - 1])
            source = str(target)
        return self.work.outcomes

    def _apply(self, number: int, step: Method, source: str, target: Path) -> None:
        from anymla.apply import apply

        def report(done: int, total: int | None, detail: str = "") -> None:
            if self.progress is not None:
                steps = len(self.recipe.steps)
                self.progress(
                    StepProgress(step=number, steps=steps, name=step.name, done=done, total=total, detail=detail)
                )

        report(0, None, "reading")
        apply(step, source, target, teacher=self.teacher, restart=self.restart, progress=report)

    def _outcome(self, step: Method, folder: Path, seconds: float) -> StepOutcome:
        account = json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))
        return StepOutcome(
            name=step.name,
            settings=step.model_dump(mode="json"),
            account=account | {"cache_bytes_at_context": self._cache_bytes(folder)},
            quality=self._quality(folder),
            seconds=seconds,
        )

    def _cache_bytes(self, folder: Path) -> int:
        from anymla.account import account

        return account(spec_of(read_config(folder)), [self.context]).cache_bytes_at[str(self.context)]

    def _quality(self, folder: Path) -> dict[str, Any] | None:
        if self.recipe.text is None:
            return None
        from anymla.evaluation.evaluate import evaluate

        scores = evaluate(folder, self.recipe.text, self.teacher, tokens=self.recipe.text_tokens)
        return {name: getattr(scores, name) for name in ("perplexity", "kl", "top1_agreement", "tokens")}

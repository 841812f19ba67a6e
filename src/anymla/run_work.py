"""The work folder of a run: the steps' checkpoints until all are done, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anymla.errors import AnymlaError, OutputError
from anymla.io.config import read_object
from anymla.io.work import WorkFolder, remove, write_json
from anymla.recipe import Recipe
from anymla.report.page import tell_place
from anymla.report.run import run_page
from anymla.run_outcome import RunReport

STEP_REPORTS = ("conversion.json", "tuning.json")


def step_folder(work: WorkFolder, recipe: Recipe, number: int) -> Path:
    """Returns where a step's checkpoint lies until the run is done."""
    return work.path / f"step-{number}-{recipe.steps[number - 1].name}"


@contextmanager
def kept(work: WorkFolder, steps: int) -> Iterator[None]:
    """Keeps ``work`` when the block is stopped and something is done, and says how to go on; else nothing is left."""
    from anymla.distributed import rank
    from anymla.sweep.progress import terminated_as_interrupted

    def done() -> int:
        return len([*work.path.glob("step-*")])

    def left() -> str:
        return f"{done()} of {steps} steps are kept: the same command goes on, with --restart it begins anew"

    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as stop:
        if done():
            stop.add_note(left())
        raise
    except AnymlaError as error:
        raise type(error)(f"{error}{f'; {left()}' if done() else ''}") from error
    except OSError as error:
        raise OutputError(f"{work.output} could not be written: {' '.join(str(error).split())}") from error
    finally:
        if rank() == 0 and not done() and not [*work.path.glob(".step-*.partial")]:
            work.discard()
        work.release()


def finish(work: WorkFolder, report: RunReport, steps_to: Path | None) -> None:
    """The last step's checkpoint takes the output's place, with what was done beside it."""
    work.commit(finishing=True)
    folders = [step_folder(work, report.recipe, number) for number in range(1, len(report.recipe.steps) + 1)]
    if steps_to is not None:
        steps_to.mkdir(exist_ok=True)
        for folder in folders[:-1]:
            if folder.is_dir():
                _tell(folder, folder, steps_to / folder.name)
                remove(steps_to / folder.name)
                folder.rename(steps_to / folder.name)
    if folders[-1].is_dir():
        for file in folders[-1].iterdir():
            file.rename(work.model / file.name)
    _tell(work.model, folders[-1], report.output)
    write_json(work.model / "run.json", report.to_dict())
    (work.model / "recipe.yaml").write_text(report.recipe.to_yaml(), encoding="utf-8")
    run_page(report, work.model).write(work.model)
    work.finish()


def _tell(folder: Path, made: Path, place: Path) -> None:
    """Lets the step's reports in ``folder``, which was ``made`` elsewhere, name the ``place`` where it will lie."""
    for name in STEP_REPORTS:
        if (path := folder / name).is_file():
            write_json(path, read_object(path) | {"output": str(place)})
    tell_place(folder, made, place)

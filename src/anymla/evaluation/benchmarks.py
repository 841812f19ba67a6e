"""What to measure beside perplexity, and the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from anymla.errors import RecipeError
from anymla.evaluation.measures import Comparison, Measure

if TYPE_CHECKING:
    from anymla.evaluation.likelihood import Questions, Track
    from anymla.evaluation.scores import Scores


class Benchmarks(BaseModel):
    """Measurements beside perplexity on a text. The names are those of the options of ``anymla eval``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field(default=(), description="Names or patterns of lm-eval's tasks.")
    include_path: Path | None = Field(default=None, description="A folder with your own task files for lm-eval.")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before each question. Default: the task's own."
    )
    probe: bool = Field(default=False, description="What the model finds again in its context, by length and depth.")
    blimp: Path | None = Field(default=None, description="A folder of BLiMP's .jsonl files, or its .zip.")
    lambada: Path | None = Field(default=None, description="A .jsonl file of passages, field 'text'.")
    limit: int | None = Field(default=None, ge=1, description="Items per task, paradigm or file. Default: all.")
    batch_size: int = Field(default=16, ge=1, description="Items that run at once.")

    @property
    def wanted(self) -> bool:
        """Returns whether there is anything to measure."""
        return bool(self.tasks) or self.probe or self.blimp is not None or self.lambada is not None

    def check_paths(self) -> None:
        """Refuses a path that leads nowhere, before anything is read.

        Raises:
            RecipeError: names the option.
        """
        for name in ("include_path", "blimp", "lambada"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise RecipeError(f"--{name.replace('_', '-')} {path} does not exist")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured, and how.

    ``scores`` are those on the text, where there was one, and ``original`` the original's, where there was one too;
    ``benchmarks`` the rest, by kind: tasks, probe, blimp, lambada.
    """

    scores: Scores | None
    benchmarks: Mapping[str, tuple[Comparison, ...]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    original: Scores | None = None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation under its stable JSON names, those of the scores among them."""
        return {
            **self.scores_dict(),
            **{kind: [row.to_dict() for row in rows] for kind, rows in self.benchmarks.items()},
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def scores_dict(self) -> dict[str, Any]:
        """The scores on the text alone; those of the original under ``original``."""
        scores = {} if self.scores is None else self.scores.to_dict()
        return scores if self.original is None else scores | {"original": self.original.to_dict()}


Prepared = dict[str, Callable[[Any, str], list[Measure]]]  # kind -> (model, what to call it) -> measures


def prepare(wanted: Benchmarks, tokenizer: Any, *, context: int | None, length: int, track: Track) -> Prepared:
    """Reads what the benchmarks need, before any model is loaded; ``length`` is the longest probe's.

    Raises:
        RecipeError, TextError: as the message says.
    """
    from anymla.evaluation.blimp import blimp_questions, read_blimp
    from anymla.evaluation.lambada import lambada_questions
    from anymla.evaluation.likelihood import answers
    from anymla.evaluation.probe import probe_questions
    from anymla.evaluation.tasks import Tasks

    questions: dict[str, Questions] = {}
    if wanted.probe:
        questions["probe"] = probe_questions(tokenizer, length)
    if wanted.blimp is not None:
        questions["blimp"] = blimp_questions(read_blimp(wanted.blimp, wanted.limit), tokenizer)
    if wanted.lambada is not None:
        questions["lambada"] = lambada_questions(wanted.lambada, tokenizer, wanted.limit)

    def asking(kind: str, asked: Questions) -> Callable[[Any, str], list[Measure]]:
        settings: dict[str, Any] = {"context": context, "batch_size": wanted.batch_size, "track": track}
        return lambda model, name: asked.measures(answers(model, asked.queries, label=f"{kind}, {name}", **settings))

    prepared = {kind: asking(kind, asked) for kind, asked in questions.items()}
    if not wanted.tasks:
        return prepared
    tasks = Tasks(wanted.tasks, wanted.include_path)
    settings = wanted.model_dump(include={"num_fewshot", "limit", "batch_size"})
    return {"tasks": lambda model, _: tasks.run(model, tokenizer, context=context, **settings)} | prepared

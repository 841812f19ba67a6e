"""Any task of lm-eval (the extra ``anymla[eval]``), on a model in memory."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from anymla.errors import RecipeError, TextError
from anymla.evaluation.measures import Measure


class Tasks:
    """Tasks that lm-eval knows, found by name or pattern before any model is loaded."""

    def __init__(self, names: Sequence[str], include_path: Path | None) -> None:
        """Finds the tasks.

        Raises:
            RecipeError: lm-eval is not installed, there is no such task, or ``include_path`` is no folder.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RecipeError("--tasks needs lm-eval: pip install 'anymla[eval]'") from error
        if include_path is not None and not include_path.is_dir():
            raise RecipeError(f"--include-path {include_path} is not a folder of task files")
        with _quiet():
            # lm-eval reads its 14,000 task files for 15 seconds: only where the names are not all in the user's own
            own = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
            alone = own is not None and set(names) <= set(own.all_subtasks)
            self._manager: Any = own if alone else TaskManager(include_path=include_path)
        self._names = [match for name in names for match in self._matches(name)]

    def _matches(self, name: str) -> list[str]:
        known = self._manager.all_tasks
        if not (matches := self._manager.match_tasks([name])):
            near = get_close_matches(name, known, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise RecipeError(f"--tasks {name}: lm-eval has no such task{hint}")
        return list(matches)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: int | None,
        num_fewshot: int | None,
        limit: int | None,
        batch_size: int,
    ) -> list[Measure]:
        """Every metric of every task, and of the groups that sum them up, with lm-eval's standard errors.

        Raises:
            TextError: a task's data or the packages that it needs are not there, or it does not run.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with _quiet():
                results = simple_evaluate(
                    HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=context),
                    tasks=list(self._names),
                    task_manager=self._manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                )
        except Exception as error:  # whatever data sets, the hub, a task's own code or its metrics raise
            if isinstance(error, MemoryError | RuntimeError) and "memory" in str(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            reason += "; its data must be fetched once where there is a network" * isinstance(error, ConnectionError)
            raise TextError(f"--tasks {','.join(self._names)}: lm-eval stopped with {reason}") from error
        return _measures(results)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's messages off stdout, and its progress bars off a stderr that is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _measures(results: Mapping[str, Any]) -> list[Measure]:
    """lm-eval's results, in its order; a key is "metric,filter"."""
    group_of = {child: group for group, children in results["group_subtasks"].items() for child in children}
    return [
        _measure(results, task, key, group_of.get(task))
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key and "_stderr," not in key
    ]


def _measure(results: Mapping[str, Any], task: str, key: str, group: str | None) -> Measure:
    metric, _, kept = key.partition(",")
    values, value = results["results"][task], float(results["results"][task][key])
    error = values.get(f"{metric}_stderr,{kept}")
    rows = [row for row in results["samples"].get(task, ()) if row["filter"] == kept]
    outcomes = [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    is_mean = len(outcomes) == len(rows) > 0 and abs(fmean(outcomes) - value) < 1e-9
    return Measure(
        name=task,
        metric=metric if kept == "none" else f"{metric}, {kept}",
        value=value,
        stderr=float(error) if isinstance(error, int | float) else None,
        samples=results["n-samples"].get(task, {}).get("effective"),
        higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
        part_of=group,
        facts={"shots": results["n-shot"].get(task), "version": results["versions"].get(task)},
        outcomes=[float(outcome) for outcome in outcomes] if is_mean else (),
    )

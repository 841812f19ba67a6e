"""All stages of a run, one after the other; before them, trials find the learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from anymla.data.mixture import Texts, collate, training_rows
from anymla.data.packing import check_packing
from anymla.distributed import first_decides, rank, wait_for_all
from anymla.errors import CheckpointError, TextError
from anymla.io.checkpoint import load_model
from anymla.io.work import WorkFolder
from anymla.methods.tune import Tune
from anymla.settings import DtypeName
from anymla.sweep.progress import decide_computing
from anymla.training.best import Best
from anymla.training.logs import Keep, Metrics, Place, Progress, TuneProgress, read_metrics, rewind_metrics, scored_in
from anymla.training.pairs import AttentionPairs
from anymla.training.parameters import always_expand, attention_names, choose_learning, with_adapters
from anymla.training.rates import LOWEST, best_power, first_power, next_power, rate_of, trial_of
from anymla.training.resume import done_steps
from anymla.training.stages import LAYERWISE, LOGITS, TRIAL, Stage, mixed, save_tuned, training_arguments
from anymla.training.trainer import TuneTrainer


@dataclass(frozen=True)
class Run:
    """What all stages have in common."""

    student: Path
    original: Path
    tuning: Tune
    stages: list[Stage]
    texts: Texts
    tokenizer: Any
    device: str

    def all_stages(self, work: WorkFolder, progress: Progress | None, reporters: list[TrainerCallback]) -> Tune:
        """Runs what ``work`` does not hold yet; the last stage's result is ``work.model``. Returns all settings."""
        teacher = self._teacher(work)
        return self._with_rate(teacher, work, progress)._stages(teacher, work, progress, reporters)

    def _with_rate(self, teacher: Any, work: WorkFolder, progress: Progress | None) -> Run:
        """This run with a learning rate: by the scores of trials, where none is given."""
        if self.tuning.learning_rate is not None:
            return self
        hidden = int(teacher.config.get_text_config().hidden_size)
        scores: dict[int, float] = dict(work.progress.get("trials") or [])

        def with_rate(power: int) -> Run:
            return replace(self, tuning=self.tuning.model_copy(update={"learning_rate": rate_of(power, hidden)}))

        def trial(power: int, stage: Stage) -> dict[str, float]:
            return with_rate(power)._trial(teacher, stage, work.path / TRIAL, progress)

        stage = trial_of(self.stages[-1])
        probe = replace(stage, steps=1)  # at a rate that changes next to nothing
        power = next_power(scores) if scores else first_power(trial(LOWEST, probe)["eval_kl"])
        while power is not None:
            scores[power] = trial(power, stage)[self.tuning.scored_by]
            if rank() == 0:
                work.commit(trials=[*scores.items()])
            power = next_power(scores)
        return with_rate(best_power(scores))

    def _trial(self, teacher: Any, stage: Stage, folder: Path, progress: Progress | None) -> dict[str, float]:
        """Scores after the few steps of ``stage``; infinite where the model breaks."""
        what = f"trial of rate {self.tuning.learning_rate:g}: step"
        place = Place(TRIAL, 0, stage.steps, stage.step_tokens, what)
        trainer = self._trainer(self.student, teacher, stage, folder, [Metrics(None, place, progress)])
        trainer.train()
        try:
            scores = trainer.evaluate()
        except CheckpointError:  # NaN
            scores = dict.fromkeys(("eval_kl", "eval_perplexity"), float("inf"))
        trainer.accelerator.free_memory()
        return dict(first_decides(scores))

    def _stages(
        self, teacher: Any, work: WorkFolder, progress: Progress | None, reporters: list[TrainerCallback]
    ) -> Tune:
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
                place = Place(stage.name, before, steps, stage.step_tokens)
                callbacks = [Metrics(work.model, place, progress), Keep(work, stage.name), *reporters]
                best = self._best(work) if last else None
                trainer = self._trainer(student, teacher, stage, folder, callbacks, best, starts=not before + at)
                trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}") if at else None)
                self._save(trainer, student, output, best)
            student, before = output, before + stage.steps
        return self.tuning

    def _best(self, work: WorkFolder) -> Best:
        """The best so far of a run that goes on."""
        scored = first_decides([self._score(line) for line in scored_in(read_metrics(work.model), LOGITS)])
        return Best(work.path / "best.safetensors", self.tuning.early_stop, scored)

    def _score(self, line: dict[str, Any]) -> float:
        return float(line[self.tuning.scored_by])

    def _trainer(
        self,
        student: Path,
        teacher: Any,
        stage: Stage,
        folder: Path,
        callbacks: list[Any],
        best: Best | None = None,
        *,
        starts: bool = False,
    ) -> TuneTrainer:
        """Trains the model at ``student``; ``starts``: what it is before the first step is scored, too."""
        tuning = self.tuning
        arguments = training_arguments(tuning, stage, folder, device=self.device)
        arguments.eval_on_start = starts
        if tuning.parallel != "fsdp":
            teacher = teacher.to(arguments.device)
        model, pairs = self._learner(student, teacher, layerwise=stage.name == LAYERWISE)
        seed = tuning.seed + (pairs is not None)
        rows = partial(training_rows, self.texts, self.tokenizer, length=stage.length, packing=tuning.packing)
        trainer = TuneTrainer(
            model=model,
            teacher=teacher,
            tuning=tuning,
            windows=self.texts.held_out,
            pairs=pairs,
            best=best,
            args=arguments,
            data_collator=collate,
            train_dataset=rows(seed=seed),
            callbacks=callbacks,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def _learner(self, student: Path, teacher: Any, *, layerwise: bool) -> tuple[Any, AttentionPairs | None]:
        """The model at ``student`` with what learns, and its attention beside the original's where that is learnt."""
        tuning = self.tuning
        model = load_model(student, dtype="bfloat16" if tuning.precision == "bfloat16" else "float32")
        pairs = AttentionPairs(teacher, model, attention_names(model)) if layerwise else None
        always_expand(model)
        if tuning.gradient_checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if tuning.adapts:
            torch.manual_seed(tuning.seed)
            return with_adapters(model, tuning), pairs
        choose_learning(model, "attention" if layerwise else tuning.train)
        return model, pairs

    def _save(self, trainer: TuneTrainer, student: Path, output: Path, best: Best | None) -> None:
        """Writes what a stage made of ``student``: at its best score, or at its end where none is kept."""
        if best is None:
            weights = trainer.learned()  # of all processes together
        if rank() == 0:
            if best is None:
                save_tuned(student, weights, self.tuning, output, last=False)
            else:
                came = student if best.place else self.student
                save_tuned(came, best.weights(), self.tuning, output, last=True)
        wait_for_all()
        trainer.accelerator.free_memory()

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

"""One stage of a run: its steps, what transformers' Trainer must know of it, and its result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from anymla.errors import RecipeError
from anymla.io.checkpoint import load_model
from anymla.methods.tune import Tune
from anymla.modeling.mfa_attention import fold_value_gates
from anymla.training.parameters import with_adapters

LAYERWISE, LOGITS, TRIAL = "layerwise", "logits", "trial"
USUAL_STEPS = 2000
RECENT = 2  # checkpoints that stay: the one that counts, and the one being written


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``steps`` of ``rows`` rows of ``length`` tokens each, shared out as ``micro`` rows at once per process."""

    name: str
    steps: int
    rows: int
    length: int
    micro: int
    accumulation: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one step, over all processes."""
        return self.rows * self.length


def make_stages(tuning: Tune, tokens: int, length: int, processes: int) -> list[Stage]:
    """The stages that ``tokens`` make, in rows of ``length`` tokens.

    Raises:
        RecipeError: the processes cannot share a step's rows.
    """
    batch = tuning.batch or processes * max(1, round(tokens / (length * USUAL_STEPS * processes)))
    if batch % processes:
        raise RecipeError(f"--batch {batch} rows cannot be shared by {processes} processes: give a multiple of it")
    own = batch // processes
    micro = max(rows for rows in range(1, min(own, tuning.micro_batch) + 1) if own % rows == 0)
    steps = max(1, tokens // (batch * length))
    first = round(steps * tuning.layerwise)
    parts = ((LAYERWISE, first), (LOGITS, steps - first))
    shape = {"rows": batch, "length": length, "micro": micro, "accumulation": own // micro}
    return [Stage(name=name, steps=part, **shape) for name, part in parts if part]


def training_arguments(tuning: Tune, stage: Stage, folder: Path, *, device: str) -> TrainingArguments:
    """The recipe in transformers' words. A trial is scored and saved by nothing in it."""
    strategy = "no" if stage.name == TRIAL else "steps"
    tenth = max(1, stage.steps // 10)
    warmup = round(tuning.warmup * stage.steps)
    falling = min(round(tuning.decay_share * stage.steps), stage.steps - warmup)
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.micro,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": falling,
            "decay_type": tuning.decay,
        },
        warmup_steps=warmup,
        adam_beta2=tuning.beta2,
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        bf16=mixed(tuning, device),
        eval_strategy=strategy,
        eval_steps=tuning.eval_every or tenth,
        save_strategy=strategy,
        save_steps=tuning.save_every or tenth,
        save_total_limit=RECENT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        seed=tuning.seed,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        ddp_find_unused_parameters=tuning.train in ("norms", "all") and stage.name != LAYERWISE,  # experts may be
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        **(sharded if tuning.parallel == "fsdp" else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    return arguments


def check_device(device: str) -> None:
    """Refuses a GPU by a number that transformers' Trainer would pass over.

    Raises:
        RecipeError: another one than the first.
    """
    kind, _, index = device.partition(":")
    if index not in ("", "0"):
        raise RecipeError(
            f"--device {device}: tuning takes the first GPU that it sees; give --device {kind}, and let it see one, "
            f"as with CUDA_VISIBLE_DEVICES={index}"
        )


def mixed(tuning: Tune, device: str) -> bool:
    """Whether weights are in float32 and products in bfloat16."""
    return tuning.precision == "mixed" or (tuning.precision is None and device != "cpu")


def save_tuned(student: Path, weights: dict[str, Any], tuning: Tune, output: Path, *, last: bool) -> None:
    """Writes the model at ``student`` to ``output``, in its own dtype, with those ``weights`` that learned.

    All others stay as they are, bit for bit; adapters are merged, and after the ``last`` stage gates are folded.
    """
    model = load_model(student)
    if tuning.adapts:
        dtype = model.dtype
        adapted = with_adapters(load_model(student, dtype="float32"), tuning)
        adapted.load_state_dict(weights, strict=False)
        model = adapted.merge_and_unload().to(dtype)
    else:
        model.load_state_dict(weights, strict=False)
    if last:
        fold_value_gates(model)
    model.save_pretrained(output)
    for file in output.glob("*.safetensors"):
        shutil.copymode(output / "config.json", file)

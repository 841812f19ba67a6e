"""In which groups --help shows the options of a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand
from typer.models import CommandFunctionType

GROUPS = {  # by the names of parameters; those in none come last
    "What": (
        *("recipe", "plan", "step", "settings", "model", "teacher", "against", "revision", "adapter", "target", "to"),
        *("data", "eval_data", "text", "tasks", "include_path", "num_fewshot", "probe", "blimp", "lambada", "prompt"),
        *("cache_type", "pad", "codec", "curve", "targets", "bundled"),
    ),
    "How much": (
        *(
            "kv_cache",
            "decode_cost",
            "rope_dims",
            "kv_rank",
            "ranks",
            "first_tokens",
            "exact_window",
            "context",
            "tokens",
            "eval_tokens",
            "length",
            "limit",
        ),
        "max_new_tokens",
    ),
    "Quality": (
        *("effort", "rope", "static_qk_norm", "factorization", "expected_rotation", "reconstruction_steps"),
        *("calibration", "calibration_tokens", "calibration_length", "layerwise", "temperature", "top_k"),
        *("cross_entropy", "redraw", "train"),
        *("lora_rank", "learning_rate", "warmup", "decay", "decay_share", "beta2", "weight_decay", "clip", "batch"),
        *("packing", "eval_every", "early_stop", "seed"),
    ),
    "Resources": (
        *("device", "dtype", "precision", "max_memory", "batch_size", "micro_batch", "gradient_checkpointing"),
        "parallel",
    ),
    "Output": (
        *("output", "overwrite", "restart", "keep_steps", "max_shard_size", "save_every", "report_to", "private"),
        *("dry_run", "as_json"),
    ),
}
REST = "Options"


class GroupedCommand(TyperCommand):
    """A command whose --help shows its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then one section per group."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *GROUPS, REST)}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                argument = parameter.param_type_name == "argument"
                sections["Arguments" if argument else group_of(parameter.name or "")].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class App(typer.Typer):
    """An app of such commands."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """As typer's."""
        return super().command(name, cls=GroupedCommand, **options)


def group_of(parameter: str) -> str:
    """The group that a parameter belongs to."""
    return next((group for group, names in GROUPS.items() if parameter in names), REST)

"""The corridor: inspect, plan and convert call the rooms in order."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla import __version__
from anymla.architectures.blueprint import Blueprint, read_blueprint, read_config
from anymla.errors import RecipeError, TextError, UnsupportedModelError
from anymla.io.auto import auto_class
from anymla.io.checkpoint import (
    check_output,
    check_weights,
    find_model,
    load_tokenizer,
    parse_size,
    safe_config,
)
from anymla.io.device import machine_memory, pick_device
from anymla.outcomes import Conversion, Inspection
from anymla.planning.plan import Plan, check_plan, explain, make_plan
from anymla.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from anymla.conversion.step import LayerResult
    from anymla.io.computing import Computing
    from anymla.io.streamed import StreamedModel
    from anymla.io.work import WorkFolder

Progress = Callable[[int, int, "LayerResult"], None]  # (layers done, layers, the last one's result)


def inspect(model: str | Path) -> Inspection:
    """Reads a model's facts from its config alone.

    Args:
        model: a local checkpoint folder or a hub id.

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
    """
    config = read_config(find_model(model, config_only=True))
    try:
        return Inspection(model=str(model), supported=True, reason=None, blueprint=read_blueprint(config))
    except UnsupportedModelError as error:
        return Inspection(model=str(model), supported=False, reason=str(error), blueprint=None)


def plan(model: str | Path, recipe: Recipe | None = None, **settings: Any) -> Plan:
    """A dry run from the config alone: cached numbers, rope dims and rank of every layer.

    Args:
        model: a local checkpoint folder or a hub id.
        recipe: settings to start from. Default: the default recipe.
        settings: fields of :class:`~anymla.Recipe` that override it, as ``kv_cache=0.25``.

    Raises:
        UnsupportedModelError, InfeasibleError, RecipeError, CheckpointError: as the message says.
    """
    blueprint = read_blueprint(read_config(find_model(model, config_only=True)))
    return make_plan(str(model), blueprint, with_settings(recipe, settings))


def explain_plan(plan: Plan) -> dict[str, Any]:
    """A plan's costs before and after: per layer cached numbers, parameters, FLOPs per token; predicted peak bytes."""
    return explain(plan, read_blueprint(read_config(find_model(plan.model, config_only=True))))


def with_settings(recipe: Recipe | None, settings: dict[str, Any]) -> Recipe:
    """``recipe`` with ``settings`` in place of its own."""
    base = {} if recipe is None else recipe.model_dump(exclude_unset=True)
    return Recipe.of(base | settings, "settings")


def convert(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | Plan | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    max_shard_size: str = "5GB",
    max_memory: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Conversion:
    """Converts a model to multi-head latent attention and writes it to ``output``.

    Args:
        model: a local checkpoint folder or a hub id; it is only read.
        output: the folder to write; loads with ``AutoModelForCausalLM.from_pretrained`` (a vision-language model with
            ``AutoModelForImageTextToText``) after ``import anymla``, or with ``trust_remote_code=True`` without it.
        recipe: settings to start from, or a plan of :func:`plan`.
        overwrite: replace ``output`` if it exists.
        restart: discard what a stopped conversion to ``output`` left, instead of going on from there.
        max_shard_size: as in ``save_pretrained``.
        max_memory: bytes of calibration activations to hold in memory, as "8GB"; the rest lies in files beside
            ``output``. Default: a quarter of the machine's memory.
        progress: called after each layer with (layers done, layers, result), and once before the first where a stopped
            conversion goes on.
        settings: fields of :class:`~anymla.Recipe` that override the recipe, as ``kv_cache=0.25``.

    What is done is kept in a folder beside ``output`` until all is; the same call goes on from there. Under torchrun
    every process takes its part of the calibration windows, and the first one writes.

    Returns:
        The report, also written beside the weights with the recipe and the final plan.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    started, output = time.monotonic(), Path(os.path.expanduser(output))
    source = find_model(model)
    read_blueprint(read_config(source))  # what is wrong with config.json is said in its own words
    check_output(output, source, overwrite=overwrite)
    shard_size = parse_size("--max-shard-size", max_shard_size)
    memory = machine_memory() // 4 if max_memory is None else parse_size("--max-memory", max_memory)
    check_weights(source)
    # with transformers' defaults where config.json says nothing
    blueprint = read_blueprint(safe_config(source).to_dict())
    chosen = _chosen_plan(str(model), blueprint, recipe, settings)
    if chosen.recipe.target == "gguf":
        _check_tokenizer(str(model), source, blueprint)
    windows = _calibration(chosen.recipe, source, blueprint)

    from anymla.calibration.parallel import join_processes
    from anymla.conversion.progress import claim, decide_computing, fingerprint, kept
    from anymla.io.streamed import StreamedModel
    from anymla.io.work import WorkFolder

    device = join_processes(pick_device(chosen.recipe.device))
    streamed, work = StreamedModel(source, dtype=chosen.recipe.dtype, device=device), WorkFolder(output)
    same = {"anymla": __version__, "--max-shard-size": shard_size}
    claim(work, lambda: same | fingerprint(streamed, chosen, windows), restart=restart)
    with kept(work, len(blueprint.layers)):
        computing = decide_computing(work, streamed.stored_dtype, device, chosen.recipe.dtype)
        streamed.compute_in(computing.dtype)
        sizes = _Sizes(memory, shard_size)
        return _convert(streamed, blueprint, chosen, windows, work, sizes, computing, progress, started)


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    with suppress(OSError):  # Linux; getrusage there begins with what the parent process held
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _chosen_plan(model: str, blueprint: Blueprint, recipe: Recipe | Plan | None, settings: dict[str, Any]) -> Plan:
    if not isinstance(recipe, Plan):
        return make_plan(model, blueprint, with_settings(recipe, settings))
    if others := [name for name in settings if name != "device"]:  # where to compute is not part of what is planned
        raise RecipeError(f"{', '.join(others)}: a plan is final; change its recipe and plan again")
    check_plan(recipe, model, blueprint)
    return recipe.model_copy(update={"recipe": with_settings(recipe.recipe, settings)})


def _check_tokenizer(model: str, source: Path, blueprint: Blueprint) -> None:
    """Refuses at the start what the export to GGUF would at the end."""
    from anymla.exports.gguf_tokenizer import known_tokenizer

    try:
        known_tokenizer(load_tokenizer(source), blueprint.vocab_size)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"--target gguf cannot hold the tokenizer of {model}: {error}; --target deepseek leaves it as it is"
        ) from error


def _calibration(recipe: Recipe, source: Path, blueprint: Blueprint) -> torch.Tensor:
    from anymla.calibration.text import bundled_text, calibration_windows

    text = recipe.calibration or bundled_text("train")
    length = min(recipe.calibration_length, blueprint.max_position_embeddings)
    windows = calibration_windows(
        text, load_tokenizer(source), tokens=recipe.calibration_tokens, length=length, seed=recipe.seed
    )
    if (largest := int(windows.max())) >= blueprint.vocab_size:
        raise TextError(f"{source}: its tokenizer gives id {largest} but the model has {blueprint.vocab_size} tokens")
    return windows


@dataclass(frozen=True)
class _Sizes:
    """Bytes of activations in memory, and of a shard."""

    memory: int
    shard: int


def _convert(
    streamed: StreamedModel,
    blueprint: Blueprint,
    plan: Plan,
    windows: torch.Tensor,
    work: WorkFolder,
    sizes: _Sizes,
    computing: Computing,
    progress: Progress | None,
    started: float,
) -> Conversion:
    """Converts what ``work`` does not hold yet, scores it, and puts it in the output's place."""
    from anymla.calibration.parallel import rank, wait_for_all, world
    from anymla.conversion.checkpoint import write_checkpoint
    from anymla.conversion.sequence import Sequence
    from anymla.evaluation.held_out import held_out_scores

    sequence = Sequence(streamed, blueprint, plan, windows, work)
    converted = sequence.run(sizes.memory // world(), sizes.shard, progress)
    before, after = held_out_scores(streamed, converted, tuples=sequence.family.layers_give_tuples)
    results = [record.result for record in converted.records]
    report = Conversion(
        output=work.output,
        plan=_final_plan(plan.model_copy(update={"layers": sequence.plans}), sequence.recipe, results),
        layers=tuple(result for result in results if result is not None),
        before=before,
        after=after,
        computing=computing,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss(),
        anymla_version=__version__,
    )
    if rank() == 0:
        attentions = [record.attention for record in converted.records if record.attention is not None]
        write_checkpoint(streamed, work, attentions, max_shard_size=sizes.shard)
        _write_report(work.model, report)
        work.finish()
    wait_for_all()
    return report


def _final_plan(plan: Plan, recipe: Recipe, results: list[LayerResult | None]) -> Plan:
    layers = tuple(
        layer
        if layer is None or result is None
        else layer.model_copy(update={"rope_dims": result.rope_dims, "kv_rank": result.kv_rank, "rope_choices": ()})
        for layer, result in zip(plan.layers, results, strict=True)
    )
    return plan.model_copy(update={"layers": layers, "recipe": recipe})


def _write_report(folder: Path, report: Conversion) -> None:
    from anymla.conversion.card import model_card

    auto = auto_class(read_config(folder)["model_type"]).__name__
    (folder / "recipe.yaml").write_text(report.plan.recipe.to_yaml(), encoding="utf-8")
    (folder / "plan.yaml").write_text(report.plan.to_yaml(), encoding="utf-8")
    (folder / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report.to_dict(), report.plan.model, auto), encoding="utf-8")

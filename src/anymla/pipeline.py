"""The corridor: inspect, plan and convert call the rooms in order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.account import Account
from anymla.architectures.model_spec import mla_source, read_config, read_model_spec, source_config
from anymla.codec_choice import AUTO, Choice, with_settings
from anymla.coded_conversion import convert_coded
from anymla.errors import RecipeError, UnsupportedModelError
from anymla.exports.format import all_formats
from anymla.io.auto import auto_class
from anymla.io.checkpoint import (
    check_output,
    check_weights,
    parse_size,
    safe_config,
)
from anymla.io.device import machine_memory, pick_device
from anymla.io.find import with_revision
from anymla.io.hub_cache import commit_of
from anymla.io.sources.locate import Located, locate
from anymla.io.sources.plain import Plain, notes_of, plain_source
from anymla.methods.base import LayerMethod
from anymla.methods.cache_coding.explain import explain_codes
from anymla.methods.mla.costs import reconstruction_steps
from anymla.methods.mla.duration import faster
from anymla.methods.mla.plan import MLAPlan, check_plan, explain, make_plan, plan_bytes
from anymla.methods.mla.settings import MLA
from anymla.modeling.spec import ModelSpec
from anymla.outcomes import CodedConversion, Conversion, Inspection
from anymla.swept_report import reported

if TYPE_CHECKING:
    from anymla.methods.mla.choose import LayerResult

Progress = Callable[[int, int, Any], None]  # (layers done, layers, the last one's result)
EARLIER = "what the steps before this one left was converted"


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Reads a model's facts from its config alone.

    Args:
        model: a local checkpoint folder or a hub id, also ``org/name@revision``.
        revision: a branch, tag or commit of a model on the hub.

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
        RecipeError: ``revision`` of a local folder.
    """
    name = with_revision(model, revision)
    source = locate(name, config_only=True)
    facts: dict[str, Any] = {"model": name, "commit": commit_of(source.base)}
    try:
        model_spec, notes = read_model_spec(source_config(source)), notes_of(source)
    except UnsupportedModelError as error:
        return Inspection(**facts, supported=False, reason=str(error), model_spec=None)
    return Inspection(**facts, supported=True, reason=None, model_spec=model_spec, notes=notes)


def plan(model: str | Path, recipe: MLA | None = None, *, revision: str | None = None, **settings: Any) -> MLAPlan:
    """A dry run of the step mla from the config alone: cached numbers, rope dims and rank of every layer.

    Args:
        model: a local checkpoint folder or a hub id, also ``org/name@revision``.
        recipe: settings to start from. Default: the default recipe.
        revision: a branch, tag or commit of a model on the hub.
        settings: fields of :class:`~anymla.MLA` that override it, as ``kv_cache=0.25``.

    Raises:
        UnsupportedModelError, InfeasibleError, RecipeError, CheckpointError: as the message says.
    """
    name, chosen = with_revision(model, revision), with_settings(recipe, settings)
    model_spec = read_model_spec(source_config(locate(name, adapter=chosen.adapter, config_only=True)))
    return make_plan(name, model_spec, chosen)


def choose(
    model: str | Path,
    recipe: MLA | None = None,
    *,
    codec: str = AUTO,
    revision: str | None = None,
    **settings: Any,
) -> Choice:
    """Returns the step that :func:`convert` would take with the same arguments, and why."""
    choice = Choice.of(codec, recipe, settings)
    source = locate(with_revision(model, revision), adapter=choice.method.adapter, config_only=True)
    return choice.for_model(read_model_spec(source_config(source)))


def plan_codes(model: str | Path, method: LayerMethod, *, revision: str | None = None) -> dict[str, Any]:
    """A dry run of a step that codes keys and values, from the config alone: see :func:`explain_codes`."""
    name = with_revision(model, revision)
    source = locate(name, adapter=method.adapter, config_only=True)
    return explain_codes(name, method, read_model_spec(source_config(source)))


def explain_plan(plan: MLAPlan) -> dict[str, Any]:
    """A plan's costs before and after: per layer cached numbers, parameters, FLOPs per token; predicted peak bytes."""
    source = locate(plan.model, adapter=plan.recipe.adapter, config_only=True)
    return explain(plan, read_model_spec(source_config(source)))


def convert(
    model: str | Path,
    output: str | Path,
    recipe: MLA | MLAPlan | None = None,
    *,
    codec: str = AUTO,
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    max_shard_size: str = "5GB",
    max_memory: str | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    told: Callable[[str], None] | None = None,
    origin: str | None = None,
    **settings: Any,
) -> Conversion | CodedConversion:
    """Makes a model's KV cache smaller, and writes the new model to ``output``.

    Args:
        model: a local checkpoint folder, a GGUF file, an adapter's folder or a hub id, also
            ``org/name@revision``; it is only read.
        output: the folder to write; loads with ``AutoModelForCausalLM.from_pretrained`` (a vision-language model with
            ``AutoModelForImageTextToText``) after ``import anymla``, or with ``trust_remote_code=True`` without it.
        recipe: settings of the step mla to start from, or a plan of :func:`plan`.
        codec: "none": the step mla, multi-head latent attention with 16-bit numbers. Or a step that codes keys and
            values: "transform_coding" or "kvquant". "auto": transform_coding, unless a recipe, a setting that only the
            step mla has, as ``target``, or the model asks for that step.
        revision: a branch, tag or commit of a model on the hub.
        overwrite: replace ``output`` if it exists.
        restart: discard what a stopped conversion to ``output`` left, instead of going on from there.
        max_shard_size: as in ``save_pretrained``.
        max_memory: bytes of calibration activations to hold in memory, as "8GB"; the rest lies in files beside
            ``output``. Default: a quarter of the machine's memory.
        progress: called after each layer with (layers done, layers, result), and once before the first where a stopped
            conversion goes on. Of codes the result is a dict, and the name of the pass after each pass of calibration.
        notify: called before the work where it will take more than ten minutes, with how long and what is faster; and
            with what is kept, where a stopped conversion goes on.
        told: called with which step the codec "auto" took, and why.
        origin: what reports call the model, where steps of a recipe made ``model`` of another one.
        settings: fields of the step, as ``kv_cache=0.25``; they override the recipe.

    What is done is kept in a folder beside ``output`` until all is; the same call goes on from there. Under torchrun
    every process takes its part of the calibration windows, and the first one writes.

    Returns:
        The report, also written beside the weights with the recipe and the final plan.

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    started, output = time.monotonic(), Path(os.path.expanduser(output))
    name = with_revision(model, revision)
    choice = Choice.of(codec, recipe, settings)
    source = locate(name, adapter=choice.method.adapter)
    # what is wrong with config.json is said in its own words
    read = mla_source if isinstance(choice.method, MLA) else read_model_spec
    choice = choice.for_model(read(source_config(source)))
    shards = parse_size("--max-shard-size", max_shard_size)
    memory = machine_memory() // 4 if max_memory is None else parse_size("--max-memory", max_memory)
    sweep: dict[str, Any] = {"memory": memory, "shard_size": shards, "restart": restart}
    _check_early(source, choice.method, output, overwrite=overwrite)
    with plain_source(source, beside=output) as plain:
        check_weights(plain.folder)
        # with transformers' defaults where config.json says nothing
        model_spec = read(safe_config(plain.folder).to_dict())
        if told is not None and choice.told is not None:
            told(choice.told)
        if origin is not None:
            plain = replace(plain, notes=(*plain.notes, EARLIER))
        called = origin or name
        if not isinstance(choice.method, MLA):
            places = (called, plain, model_spec, output, progress)
            return convert_coded(choice.method, *places, started=started, note=notify, **sweep)
        chosen = _chosen_plan(called, model_spec, recipe or choice.method, settings)
        if chosen.recipe.target is not None:  # refuses at the start what the export would at the end
            all_formats()[chosen.recipe.target].check_source(name, plain.folder, model_spec.vocab_size)
        return _convert(plain, model_spec, chosen, output, progress, started, note=notify, **sweep)


def _check_early(source: Located, method: LayerMethod, output: Path, *, overwrite: bool) -> None:
    """Refuses what makes the work useless, before any weight is read.

    Raises:
        OutputError, RecipeError, TextError: the output, the device or the text cannot be.
    """
    for path in source.paths:
        check_output(output, path, overwrite=overwrite)
    from anymla.data.text import check_texts

    check_texts({"--calibration": method.calibration})
    pick_device(method.device)


def _chosen_plan(model: str, model_spec: ModelSpec, recipe: MLA | MLAPlan | None, settings: dict[str, Any]) -> MLAPlan:
    if not isinstance(recipe, MLAPlan):
        return _with_steps(make_plan(model, model_spec, with_settings(recipe, settings)), model_spec)
    if others := [name for name in settings if name != "device"]:  # where to compute is not part of what is planned
        raise RecipeError(f"{', '.join(others)}: a plan is final; change its recipe and plan again")
    check_plan(recipe, model, model_spec)
    return _with_steps(recipe.model_copy(update={"recipe": with_settings(recipe, settings)}), model_spec)


def _with_steps(plan: MLAPlan, model_spec: ModelSpec) -> MLAPlan:
    """``plan`` with its number of gradient steps spelled out."""
    steps = reconstruction_steps(model_spec, plan.recipe)
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"reconstruction_steps": steps})})


def _convert(
    source: Plain,
    model_spec: ModelSpec,
    chosen: MLAPlan,
    output: Path,
    progress: Progress | None,
    started: float,
    **settings: Any,
) -> Conversion:
    """Runs the conversion over ``source``, scores it, and writes its report; ``settings`` are those of the sweep."""
    from anymla.distributed import rank
    from anymla.methods.mla.choose import LayerResult
    from anymla.sweep.run import Run, swept

    def layer(done: int, layers: int, result: dict[str, Any]) -> None:
        if progress is not None:
            progress(done, layers, LayerResult(**result))

    run = Run(output=output, progress=layer, faster=partial(faster, model_spec, chosen.recipe), **settings)
    with swept(chosen.recipe, source.folder, model_spec, run, choices=chosen.layers) as done:
        results = [None if record.result is None else LayerResult(**record.result) for record in done.records]
        before, after = (
            Account(layers=tuple(found for record in done.records if (found := getattr(record, when)) is not None))
            for when in ("before", "after")
        )
        facts = reported(done, source, output, (before, after), started)
        final = _final_plan(chosen.model_copy(update={"layers": done.plan.choices}), results)
        report = Conversion(
            plan=final,
            layers=tuple(result for result in results if result is not None),
            cache_bytes_at=plan_bytes(final, model_spec),
            **facts,
        )
        if rank() == 0:
            _write_report(done.folder, report)
    return report


def _final_plan(plan: MLAPlan, results: list[LayerResult | None]) -> MLAPlan:
    layers = tuple(
        layer
        if layer is None or result is None
        else layer.model_copy(update={"rope_dims": result.rope_dims, "kv_rank": result.kv_rank, "rope_choices": ()})
        for layer, result in zip(plan.layers, results, strict=True)
    )
    return plan.model_copy(update={"layers": layers})


def _write_report(folder: Path, report: Conversion) -> None:
    from anymla.cards import model_card
    from anymla.report.conversion import conversion_page

    auto = auto_class(read_config(folder)["model_type"]).__name__
    (folder / "recipe.yaml").write_text(report.plan.recipe.to_yaml(), encoding="utf-8")
    (folder / "plan.yaml").write_text(report.plan.to_yaml(), encoding="utf-8")
    (folder / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report.to_dict(), auto), encoding="utf-8")
    conversion_page(report, folder).write(folder)

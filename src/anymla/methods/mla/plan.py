"""The plan: what each layer becomes, what it costs, before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anymla.account import account, in_dtype
from anymla.errors import InfeasibleError, RecipeError
from anymla.io.device import matmul_speed
from anymla.layouts import GRID_TARGETS, LIMITS, check_target, kernel_note, listed, most_channels, most_rope_dims
from anymla.methods.mla.costs import latent_cost, original_cost, peak_memory
from anymla.methods.mla.duration import estimated_seconds, faster
from anymla.methods.mla.settings import MLA, SHARED_ROPES
from anymla.methods.mla.window import check_exact_window, exact_window_of, window_hint
from anymla.modeling.spec import AttentionSpec, LatentSpec, LayerSpec, ModelSpec
from anymla.settings import MOST, read_yaml, where

TYPICAL_ROPE_SHARE = 0.3  # of the cached numbers; shown by a dry run, replaced by the choice on calibration text
ROPE_SHARES = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # tried on calibration text

EvenInt = Annotated[int, Field(ge=0, le=MOST, multiple_of=2)]
Rank = Annotated[int, Field(gt=0, le=MOST)]


class LayerPlan(BaseModel):
    """One layer: cached numbers per token, and how they split into 2K rope dims and the latent rank.

    ``rope_dims`` is the total over kv heads. Where it is None, conversion chooses it among ``rope_choices``; so also
    ``rope_step``, where the recipe's target has a grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cached_numbers: Rank
    rope_dims: EvenInt | None
    kv_rank: Rank | None
    rope_choices: Annotated[tuple[EvenInt, ...], Field(strict=False)] = ()  # YAML has lists only
    rope_step: Rank | None = None  # of a target whose channels lie on a grid: channel i turns as pair i * rope_step

    @model_validator(mode="after")
    def _add_up(self) -> LayerPlan:
        if self.rope_dims is not None and self.kv_rank is not None:
            if self.rope_dims + self.kv_rank != self.cached_numbers:
                raise ValueError("rope_dims and kv_rank must add up to cached_numbers")
        elif self.rope_dims is not None or self.kv_rank is not None or not self.rope_choices:
            raise ValueError("must have rope_dims and kv_rank, or neither and rope_choices")
        elif max(self.rope_choices) >= self.cached_numbers:
            raise ValueError("rope_choices must be less than cached_numbers")
        return self


class MLAPlan(BaseModel):
    """A recipe and what it means for every layer of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    recipe: MLA
    layers: tuple[LayerPlan | None, ...] = Field(
        strict=False
    )  # None: a layer without softmax attention, which stays as it is

    def to_yaml(self) -> str:
        """The plan as YAML, for ``anymla convert --plan``."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def read(cls, path: Path) -> MLAPlan:
        """Reads a plan that ``anymla plan`` wrote.

        Raises:
            RecipeError: the file is missing or is not a plan.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(f"{path}: {where(first['loc'])}: {first['msg']}") from error


def make_plan(model: str, model_spec: ModelSpec, recipe: MLA) -> MLAPlan:
    """Turns the budget into cached numbers, rope dims and rank per layer.

    Raises:
        InfeasibleError: the budget or an explicit size cannot be met; names what can.
        UnsupportedModelError: the recipe's target cannot hold this model.
        RecipeError: a setting has no meaning for the target.
    """
    check_settings(model, model_spec, recipe)
    return MLAPlan(model=model, recipe=recipe, layers=plan_layers(model_spec, recipe))


def check_settings(model: str, model_spec: ModelSpec, recipe: MLA) -> None:
    """Refuses what a config alone tells to be impossible.

    Raises:
        UnsupportedModelError: the recipe's target or its exact window cannot be had with this model.
        RecipeError: a setting has no meaning for the target.
        InfeasibleError: the exact window is too large for the calibration windows.
    """
    check_exact_window(model, model_spec, recipe)
    if recipe.static_qk_norm and not LIMITS[recipe.target].grid:
        targets = listed(GRID_TARGETS, "and")
        raise RecipeError(f"--static-qk-norm is for --target {targets}: others keep the norms as they are")
    if recipe.target is not None:
        check_target(recipe.target, model, model_spec, static_norms=recipe.static_qk_norm)


def plan_layers(model_spec: ModelSpec, recipe: MLA) -> tuple[LayerPlan | None, ...]:
    """The budget as cached numbers, rope dims and rank of every layer.

    Raises:
        InfeasibleError: the budget or an explicit size cannot be met; names what can.
    """
    most = None if recipe.target is None else most_rope_dims(recipe.target, recipe.rope, model_spec)
    return tuple(
        None if layer.attention is None else _plan_layer(layer.attention, recipe, index, most)
        for index, layer in enumerate(model_spec.layers)
    )


def check_plan(plan: MLAPlan, model: str, model_spec: ModelSpec) -> None:
    """Refuses a plan that was made for another model.

    Raises:
        InfeasibleError: the number of layers or a layer's sizes do not fit.
    """
    check_exact_window(model, model_spec, plan.recipe)
    _check_target(plan, model, model_spec)
    if len(plan.layers) != len(model_spec.layers):
        raise InfeasibleError(f"the plan has {len(plan.layers)} layers and {model} has {len(model_spec.layers)}")
    for index, (layer, old) in enumerate(zip(plan.layers, model_spec.layers, strict=True)):
        spec = old.attention
        if layer is None or spec is None:
            if (layer is None) != (spec is None):
                raise InfeasibleError(f"the plan's layer {index}: only one of plan and {model} has attention there")
            continue
        keys = spec.num_kv_heads * spec.head_dim
        turned = 2 * spec.num_kv_heads * spec.rope_pairs
        step = _rope_step(spec, plan.recipe)
        for dims in layer.rope_choices if layer.rope_dims is None else (layer.rope_dims,):
            rank = layer.cached_numbers - dims
            if dims > turned or dims % step or rank > 2 * keys:
                raise InfeasibleError(
                    f"the plan's layer {index}: rope_dims {dims} and kv_rank {rank} do not fit {model}, "
                    f"which has {turned} in steps of {step}, and {2 * keys}"
                )


def _check_target(plan: MLAPlan, model: str, model_spec: ModelSpec) -> None:
    """Refuses a plan that its own recipe's target cannot hold."""
    target, layers = plan.recipe.target, [layer for layer in plan.layers if layer is not None]
    most = None
    if target is not None:
        check_target(target, model, model_spec, static_norms=plan.recipe.static_qk_norm)
        most = most_rope_dims(target, plan.recipe.rope, model_spec)
        if any(layer != layers[0] for layer in layers):
            raise InfeasibleError(f"the plan's layers differ, and --target {target} needs one split for all")
    for layer in layers:
        widest = max(layer.rope_choices) if layer.rope_dims is None else layer.rope_dims
        if most is not None and widest > most:
            raise InfeasibleError(
                f"the plan's rope dims {widest} are more than the {most} that --target {target} holds"
            )
        last, grid = (widest // 2 - 1) * (layer.rope_step or 1), LIMITS[target].grid
        if (layer.rope_step is not None and not grid) or (grid and not 0 <= last < most_channels(model_spec)):
            raise InfeasibleError(f"the plan's rope_step {layer.rope_step} and rope dims {widest} do not fit {model}")


def _rope_step(spec: AttentionSpec, recipe: MLA) -> int:
    """Rope dims, as a total, come in pairs that all heads share or in pairs of every head."""
    return 2 if recipe.rope in SHARED_ROPES else 2 * spec.num_kv_heads


def _plan_layer(spec: AttentionSpec, recipe: MLA, index: int, most: int | None) -> LayerPlan:
    """``most``: rope dims that the recipe's target can hold, where it has a limit."""
    keys = spec.num_kv_heads * spec.head_dim
    turned, step = _turned(spec, recipe, most)
    rope_dims = _explicit_rope_dims(spec, recipe)
    if rope_dims is not None and rope_dims > turned:
        raise InfeasibleError(
            f"--rope-dims {recipe.rope_dims} is too large for --target {recipe.target}, which holds {turned} dims in "
            "all here (docs/exporting.md)"
        )
    if recipe.kv_rank is not None and recipe.kv_rank > 2 * keys:
        raise InfeasibleError(
            f"--kv-rank {recipe.kv_rank} is more than layer {index} has: keys and values are {2 * keys} numbers"
        )
    cached = int(spec.cached_numbers * recipe.kv_cache + 1e-9)
    least = (step if rope_dims is None else rope_dims) + (recipe.kv_rank or 1)
    if rope_dims is not None and recipe.kv_rank is not None:
        return LayerPlan(cached_numbers=least, rope_dims=rope_dims, kv_rank=recipe.kv_rank)
    given = "".join(f" --{name.replace('_', '-')} {value}" for name, value in _explicit(recipe).items())
    if least > spec.cached_numbers:
        raise InfeasibleError(
            f"--rope {recipe.rope}{given} needs at least {least} numbers per token; the original's layer {index} has "
            f"{spec.cached_numbers}: with these rope dims the largest --kv-rank is "
            f"{spec.cached_numbers - least + (recipe.kv_rank or 1)}"
        )
    if cached < least:
        smallest = -(-least * 10000 // spec.cached_numbers) / 10000
        raise InfeasibleError(
            f"--kv-cache {recipe.kv_cache:g} leaves layer {index} {cached} numbers per token; "
            f"--rope {recipe.rope}{given} needs at least {least}: the smallest possible is --kv-cache {smallest:g}"
        )
    if recipe.kv_rank is not None:
        rope_dims = min((cached - recipe.kv_rank) // step * step, turned) if turned else 0
        return LayerPlan(cached_numbers=rope_dims + recipe.kv_rank, rope_dims=rope_dims, kv_rank=recipe.kv_rank)
    if rope_dims is not None:
        rank = min(cached - rope_dims, 2 * keys)
        return LayerPlan(cached_numbers=rope_dims + rank, rope_dims=rope_dims, kv_rank=rank)
    whole = cached >= 2 * keys and turned == 2 * spec.num_kv_heads * spec.rope_pairs
    return _free_split(cached, step, keys, turned, whole)


def _turned(spec: AttentionSpec, recipe: MLA, most: int | None) -> tuple[int, int]:
    """The most rope dims that a layer can keep, and the steps they come in; both 0 where it has no rope."""
    turned = 2 * spec.num_kv_heads * spec.rope_pairs
    step = _rope_step(spec, recipe) if turned else 0
    if not turned or most is None:
        return turned, step
    if most < step:
        raise InfeasibleError(
            f"--rope {recipe.rope} turns {step} dims at least, --target {recipe.target} holds {most}: leave --rope out"
        )
    return min(turned, most // step * step), step


def _free_split(cached: int, step: int, keys: int, turned: int, whole: bool) -> LayerPlan:
    """Leaves the split to calibration; with the ``whole`` budget everything fits and nothing is left to choose."""
    if whole or not turned:
        cached = min(cached, 2 * keys)
        rope_dims = turned if whole else 0
        return LayerPlan(cached_numbers=cached, rope_dims=rope_dims, kv_rank=cached - rope_dims)
    most = min(turned, (cached - 1) // step * step)
    shares = {round(cached * share / step) * step for share in ROPE_SHARES}
    choices = tuple(sorted({min(max(dims, step), most) for dims in shares}))
    return LayerPlan(cached_numbers=cached, rope_dims=None, kv_rank=None, rope_choices=choices)


def _explicit(recipe: MLA) -> dict[str, int]:
    return {name: value for name in ("rope_dims", "kv_rank") if (value := getattr(recipe, name)) is not None}


def _explicit_rope_dims(spec: AttentionSpec, recipe: MLA) -> int | None:
    """The recipe's rope dims as a total over kv heads, checked; 0 where this layer has no rope."""
    if recipe.rope_dims is None or not spec.rope_pairs:
        return None if spec.rope_pairs else 0
    shared = recipe.rope in SHARED_ROPES
    most = 2 * spec.rope_pairs * (spec.num_kv_heads if shared else 1)
    what = "in total" if shared else "per KV head"
    if recipe.rope_dims % 2:
        raise InfeasibleError(
            f"--rope-dims {recipe.rope_dims} is odd: rotated dims come in pairs ({what}, at most {most})"
        )
    if recipe.rope_dims > most:
        raise InfeasibleError(
            f"--rope-dims {recipe.rope_dims} is too large: this model has {most} {what} for --rope {recipe.rope}"
        )
    return recipe.rope_dims if shared else recipe.rope_dims * spec.num_kv_heads


def typical_split(layer: LayerPlan) -> tuple[int, int]:
    """(rope dims, rank) of a layer; where they are still to be chosen, what the choice usually comes near."""
    if layer.rope_dims is not None and layer.kv_rank is not None:
        return layer.rope_dims, layer.kv_rank
    rope_dims = min(layer.rope_choices, key=lambda dims: abs(dims - TYPICAL_ROPE_SHARE * layer.cached_numbers))
    return rope_dims, layer.cached_numbers - rope_dims


def spec_after(model_spec: ModelSpec, recipe: MLA, layers: Sequence[LayerPlan | None]) -> ModelSpec:
    """The model with ``layers`` as planned; where a split is still to be chosen, with the typical one."""
    biases = LIMITS[recipe.target].biases

    def converted(old: LayerSpec, layer: LayerPlan | None) -> LayerSpec:
        if layer is None or old.attention is None:
            return old
        (rope_dims, rank), window = typical_split(layer), exact_window_of(old.attention, recipe)
        latent = LatentSpec(kv_lora_rank=rank, qk_rope_head_dim=rope_dims, biases=biases, exact_window=window)
        return replace(old, latent=latent, attention_bytes=None)

    after = tuple(converted(old, layer) for old, layer in zip(model_spec.layers, layers, strict=True))
    return in_dtype(replace(model_spec, layers=after), recipe.dtype)


def plan_bytes(plan: MLAPlan, model_spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Bytes of the cache before and after, by the number of tokens in it."""
    before = account(in_dtype(model_spec, plan.recipe.dtype)).cache_bytes_at
    after = account(spec_after(model_spec, plan.recipe, plan.layers)).cache_bytes_at
    return {length: {"before": before[length], "after": after[length]} for length in before}


def explain(plan: MLAPlan, model_spec: ModelSpec) -> dict[str, Any]:
    """The plan's costs, ready for a table or JSON: per layer and in total, before and after.

    ``estimated_seconds`` are those of this machine's processor.
    """
    layers = []
    bytes_before, bytes_after = (
        account(in_dtype(model_spec, plan.recipe.dtype)),
        account(spec_after(model_spec, plan.recipe, plan.layers)),
    )
    for index, (layer, old) in enumerate(zip(plan.layers, model_spec.layers, strict=True)):
        spec = old.attention
        if layer is None or spec is None:
            continue
        rope_dims, rank = typical_split(layer)
        before, after = (
            original_cost(spec, model_spec.hidden_size),
            latent_cost(spec, model_spec.hidden_size, rope_dims, rank, exact_window_of(spec, plan.recipe)),
        )
        layers.append(
            {
                "layer": index,
                "rope_dims": rope_dims,
                "kv_rank": rank,
                "chosen_on_calibration": layer.rope_dims is None,
                "cache_bytes_per_token": {
                    "before": bytes_before.layers[index].cache_bytes_per_token,
                    "after": bytes_after.layers[index].cache_bytes_per_token,
                },
                "cached_numbers": {"before": spec.cached_numbers, "after": layer.cached_numbers},
                "parameters": {"before": before.parameters, "after": after.parameters},
                "flops_per_token": {"before": before.flops_per_token, "after": after.flops_per_token},
            }
        )
    speed = matmul_speed()
    told = (
        kernel_note(plan.recipe.target, max(typical_split(layer)[1] for layer in plan.layers if layer)),
        faster(model_spec, plan.recipe, speed),
    )
    return {
        "model": plan.model,
        "recipe": plan.recipe.model_dump(),
        "layers": layers,
        "kept_layers": [index for index, layer in enumerate(plan.layers) if layer is None],
        "notes": [*filter(None, told), *window_hint(model_spec, plan.recipe)],
        "cache_bytes_per_token": {
            "before": bytes_before.cache_bytes_per_token,
            "after": bytes_after.cache_bytes_per_token,
        },
        "cache_bytes_at": plan_bytes(plan, model_spec),
        "exact_window_bytes": bytes_after.cache_bytes_once,
        "predicted_peak_bytes": peak_memory(model_spec, plan.recipe),
        "estimated_seconds": round(estimated_seconds(model_spec, plan.recipe, speed)),
    }

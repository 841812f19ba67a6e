"""What every layer becomes under a budget, from the config alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anymla.account import in_dtype
from anymla.errors import InfeasibleError, RecipeError
from anymla.layouts import GRID_TARGETS, LIMITS, SHAPES, check_cache_type, check_target, listed, most_rope_dims
from anymla.methods.base import Facts
from anymla.methods.mla.ranks import SURVEYED, spread
from anymla.methods.mla.rope import ROPE_CHOICES
from anymla.methods.mla.window import check_exact_window, exact_window_of
from anymla.methods.ranks import Room
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA

TYPICAL_ROPE_SHARE = 0.3  # of the cached numbers; shown by a dry run, replaced by the choice on calibration text
ROPE_SHARES = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # tried on calibration text

EvenInt = Annotated[int, Field(ge=0, le=MOST, multiple_of=2)]
Rank = Annotated[int, Field(gt=0, le=MOST)]


class LayerPlan(BaseModel):
    """One layer: cached numbers per token, and how they split into 2K rope dims and the latent rank.

    ``rope_dims`` is the total over kv heads. If it is None, conversion chooses it among ``rope_choices``. It also
    chooses ``rope_step`` if the recipe's target has a grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cached_numbers: Rank
    rope_dims: EvenInt | None
    kv_rank: Rank | None
    rope_choices: Annotated[tuple[EvenInt, ...], Field(strict=False)] = ()  # YAML has lists only
    open_budget: bool = False  # whether a survey still says how many of all layers' numbers this one has
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


def check_settings(model: str, model_spec: ModelSpec, recipe: MLA) -> None:
    """Refuses what a config alone tells to be impossible.

    Raises:
        UnsupportedModelError: the recipe's target or its exact window cannot be had with this model.
        RecipeError: a setting has no meaning for the target.
        InfeasibleError: the exact window is too large for the calibration windows.
    """
    if any(layer.shared is not None for layer in model_spec.layers) and _beside_maps(recipe):
        raise RecipeError(f"{model}: its layers share attention maps: leave {_beside_maps(recipe)} out")
    check_exact_window(model, model_spec, recipe)
    if recipe.kv_rank is not None and recipe.ranks != "uniform":
        raise RecipeError(f"--ranks {recipe.ranks} gives every layer a rank of its own: leave --kv-rank out")
    if recipe.static_qk_norm and not LIMITS[recipe.target].grid:
        targets = listed(GRID_TARGETS, "and")
        raise RecipeError(f"--static-qk-norm is for --target {targets}: others keep the norms unchanged")
    if recipe.target is not None:
        check_target(recipe.target, model, model_spec, static_norms=recipe.static_qk_norm)
    check_cache_type(recipe.cache_type, recipe.target)


def _beside_maps(recipe: MLA) -> str | None:
    """A setting that a model whose layers share attention maps cannot have."""
    given = {"target": recipe.target, "exact_window": recipe.exact_window, "ranks": recipe.ranks != "uniform"}
    return next((name for name, value in given.items() if value), None)


def plan_layers(model_spec: ModelSpec, recipe: MLA, facts: Facts | None = None) -> tuple[LayerPlan | None, ...]:
    """The budget as cached numbers, rope dims and rank of every layer.

    ``facts``: what the survey that ``recipe.ranks`` needs says of the layers; without them its layers stay open.

    Raises:
        InfeasibleError: the budget or an explicit size cannot be met; names what can.
    """
    most = None if recipe.target is None else most_rope_dims(recipe.target, recipe.rope, model_spec)
    even = {}
    for index, spec in model_spec.attention_layers.items():
        cached, takes_map = int(spec.cached_numbers * recipe.kv_cache + 1e-9), model_spec.layers[index].takes_map
        even[index] = _plan_values(spec, recipe) if takes_map else _plan_layer(spec, recipe, index, most, cached)
    if recipe.ranks == "uniform" or LIMITS[recipe.target].uniform or recipe.kv_cache == 1:
        return tuple(map(even.get, range(len(model_spec.layers))))
    specs = [*model_spec.attention_layers.values()]
    rooms = [Room(_least(spec, recipe, most), spec.cached_numbers) for spec in specs]
    typical = [typical_split(layer)[0] for layer in even.values()]
    known = [facts[index] for index in even] if facts else None
    numbers = spread(recipe.ranks, rooms, [layer.cached_numbers for layer in even.values()], typical, known)
    plans = zip(even, specs, numbers, strict=True)
    planned = {index: _plan_layer(spec, recipe, index, most, cached) for index, spec, cached in plans}
    opened = {"open_budget": not facts and recipe.ranks in SURVEYED}
    planned = {index: layer.model_copy(update=opened) for index, layer in planned.items()}
    return tuple(map(planned.get, range(len(model_spec.layers))))


def allotted(
    layers: Sequence[LayerPlan | None], recipe: MLA, model_spec: ModelSpec, facts: Facts
) -> tuple[LayerPlan | None, ...]:
    """``layers`` with the part of the budget that ``facts`` give to those that are still open."""
    if not any(layer is not None and layer.open_budget for layer in layers):
        return tuple(layers)
    new = plan_layers(model_spec, recipe, facts)
    return tuple(
        after if layer is not None and layer.open_budget else layer for layer, after in zip(layers, new, strict=True)
    )


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


def rope_step(spec: AttentionSpec, recipe: MLA) -> int:
    """Rope dims, as a total, come in pairs that all heads share or in pairs of every head."""
    return 2 if ROPE_CHOICES[recipe.rope].shared else 2 * spec.num_kv_heads


def _least(spec: AttentionSpec, recipe: MLA, most: int | None) -> int:
    """The fewest numbers that a layer can have."""
    rope_dims = _explicit_rope_dims(spec, recipe)
    return (_rotated(spec, recipe, most)[1] if rope_dims is None else rope_dims) + (recipe.kv_rank or _block(recipe))


def _plan_values(spec: AttentionSpec, recipe: MLA) -> LayerPlan:
    """A layer that attends by another one's map: its cache was values alone, of which the budget keeps its share."""
    values = spec.num_kv_heads * spec.head_dim
    rank = min(values, recipe.kv_rank or max(1, int(values * recipe.kv_cache + 1e-9)))
    return LayerPlan(cached_numbers=rank, rope_dims=0, kv_rank=rank)


def _plan_layer(spec: AttentionSpec, recipe: MLA, index: int, most: int | None, cached: int) -> LayerPlan:
    """``most``: rope dims that the recipe's target can hold, where it has a limit; ``cached``: numbers of the layer."""
    layer = _sized(spec, recipe, index, most, cached - cached % _block(recipe))
    check_shape(recipe, *typical_split(layer))
    return layer


def check_shape(recipe: MLA, rope_dims: int, rank: int) -> None:
    """Refuses sizes that the engines of the recipe's target do not take.

    Raises:
        InfeasibleError: names the nearest sizes that they take.
    """
    if (reason := SHAPES[recipe.target].refusal(rank, rope_dims, recipe.cache_type)) is not None:
        raise InfeasibleError(f"--target {recipe.target} {reason}")


def _block(recipe: MLA) -> int:
    """Of how many numbers rank and rope dims are multiples."""
    return SHAPES[recipe.target].block(recipe.cache_type)


def _sized(spec: AttentionSpec, recipe: MLA, index: int, most: int | None, cached: int) -> LayerPlan:
    keys = spec.num_kv_heads * spec.head_dim
    rotated, step = _rotated(spec, recipe, most)
    rope_dims = _explicit_rope_dims(spec, recipe)
    if rope_dims is not None and rope_dims > rotated:
        raise InfeasibleError(
            f"--rope-dims {recipe.rope_dims} is too large for --target {recipe.target}, which holds {rotated} dims in "
            "all here (docs/exporting.md)"
        )
    if recipe.kv_rank is not None and recipe.kv_rank > 2 * keys:
        raise InfeasibleError(
            f"--kv-rank {recipe.kv_rank} is more than layer {index} has: keys and values are {2 * keys} numbers"
        )
    least = _least(spec, recipe, most)
    if rope_dims is not None and recipe.kv_rank is not None:
        return LayerPlan(cached_numbers=least, rope_dims=rope_dims, kv_rank=recipe.kv_rank)
    given = "".join(f" --{name.replace('_', '-')} {value}" for name, value in _explicit(recipe).items())
    if least > spec.cached_numbers:
        raise InfeasibleError(
            f"--rope {recipe.rope}{given} needs at least {least} numbers per token; the original's layer {index} has "
            f"{spec.cached_numbers}: with these rope dims the largest --kv-rank is "
            f"{spec.cached_numbers - least + (recipe.kv_rank or _block(recipe))}"
        )
    if cached < least:
        smallest = -(-least * 10000 // spec.cached_numbers) / 10000
        raise InfeasibleError(
            f"--kv-cache {recipe.kv_cache:g} leaves layer {index} {cached} numbers per token; "
            f"--rope {recipe.rope}{given} needs at least {least}: the smallest possible is --kv-cache {smallest:g}"
        )
    if recipe.kv_rank is not None:
        rope_dims = min((cached - recipe.kv_rank) // step * step, rotated) if rotated else 0
        return LayerPlan(cached_numbers=rope_dims + recipe.kv_rank, rope_dims=rope_dims, kv_rank=recipe.kv_rank)
    if rope_dims is not None:
        rank = min(cached - rope_dims, 2 * keys)
        return LayerPlan(cached_numbers=rope_dims + rank, rope_dims=rope_dims, kv_rank=rank)
    whole = cached >= 2 * keys and rotated == 2 * spec.num_kv_heads * spec.rope_pairs
    return _free_split(cached, step, keys, rotated, whole, SHAPES[recipe.target].preferred)


def _rotated(spec: AttentionSpec, recipe: MLA, most: int | None) -> tuple[int, int]:
    """The most rope dims that a layer can keep, and the steps they come in; both 0 where it has no rope."""
    rotated = 2 * spec.num_kv_heads * spec.rope_pairs
    step = math.lcm(rope_step(spec, recipe), _block(recipe)) if rotated else 0
    if not rotated or most is None:
        return rotated, step
    if most < step and recipe.cache_type is not None:
        raise InfeasibleError(
            f"--cache-type {recipe.cache_type} takes {step} rope dims at least, --target {recipe.target} holds {most} "
            "of this model: leave it out here, and anymla export --cache-type fills blocks with zeros"
        )
    if most < step:
        raise InfeasibleError(
            f"--rope {recipe.rope} turns {step} dims at least, --target {recipe.target} holds {most}: leave --rope out"
        )
    return min(rotated, most // step * step), step


def _free_split(
    cached: int, step: int, keys: int, rotated: int, whole: bool, preferred: Callable[[int], bool]
) -> LayerPlan:
    """Leaves the split to calibration; with the ``whole`` budget everything fits and nothing is left to choose.

    ``preferred``: whether the target's engines like a rank best.
    """
    if whole or not rotated:
        cached = min(cached, 2 * keys)
        rope_dims = rotated if whole else 0
        return LayerPlan(cached_numbers=cached, rope_dims=rope_dims, kv_rank=cached - rope_dims)
    most = min(rotated, (cached - 1) // step * step)
    shares = {round(cached * share / step) * step for share in ROPE_SHARES}
    choices = {min(max(dims, step), most) for dims in shares}
    choices |= {dims for dims in range(step, most + 1, step) if preferred(cached - dims)}
    return LayerPlan(cached_numbers=cached, rope_dims=None, kv_rank=None, rope_choices=tuple(sorted(choices)))


def _explicit(recipe: MLA) -> dict[str, int]:
    return {name: value for name in ("rope_dims", "kv_rank") if (value := getattr(recipe, name)) is not None}


def _explicit_rope_dims(spec: AttentionSpec, recipe: MLA) -> int | None:
    """The recipe's rope dims as a total over kv heads, checked; 0 where this layer has no rope."""
    if recipe.rope_dims is None or not spec.rope_pairs:
        return None if spec.rope_pairs else 0
    shared = ROPE_CHOICES[recipe.rope].shared
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

"""The plan: what each layer becomes, what it costs, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anymla.account import account, in_dtype
from anymla.errors import InfeasibleError, RecipeError
from anymla.io.device import matmul_speed
from anymla.layouts import LIMITS, SHAPES, check_cache_type, check_target, most_channels, most_rope_dims
from anymla.methods.mla.costs import latent_cost, original_cost, peak_memory
from anymla.methods.mla.duration import estimated_seconds, faster
from anymla.methods.mla.layer_plan import (
    LayerPlan,
    check_settings,
    check_shape,
    plan_layers,
    rope_step,
    spec_after,
    typical_split,
)
from anymla.methods.mla.settings import MLA
from anymla.methods.mla.window import check_exact_window, exact_window_of, window_hint
from anymla.modeling.spec import ModelSpec
from anymla.settings import read_yaml, where


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
        rotated = 2 * spec.num_kv_heads * spec.rope_pairs
        step = rope_step(spec, plan.recipe)
        for dims in layer.rope_choices if layer.rope_dims is None else (layer.rope_dims,):
            rank = layer.cached_numbers - dims
            if dims > rotated or dims % step or rank > 2 * keys:
                raise InfeasibleError(
                    f"the plan's layer {index}: rope_dims {dims} and kv_rank {rank} do not fit {model}, "
                    f"which has {rotated} in steps of {step}, and {2 * keys}"
                )


def _check_target(plan: MLAPlan, model: str, model_spec: ModelSpec) -> None:
    """Refuses a plan that its own recipe's target cannot hold."""
    target, layers = plan.recipe.target, [layer for layer in plan.layers if layer is not None]
    check_cache_type(plan.recipe.cache_type, target)
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
        check_shape(plan.recipe, *typical_split(layer))
        last, grid = (widest // 2 - 1) * (layer.rope_step or 1), LIMITS[target].grid
        if (layer.rope_step is not None and not grid) or (grid and not 0 <= last < most_channels(model_spec)):
            raise InfeasibleError(f"the plan's rope_step {layer.rope_step} and rope dims {widest} do not fit {model}")


def _kernels(plan: MLAPlan, model_spec: ModelSpec) -> str | None:
    """What the plan's sizes mean for the kernels that will serve it."""
    splits = [typical_split(layer) for layer in plan.layers if layer is not None]
    rope_dims, rank = max(splits, key=lambda split: split[1])
    if (target := plan.recipe.target) is None:
        return None
    room = min(spec.cached_numbers for spec in model_spec.attention_layers.values())
    most = most_rope_dims(target, plan.recipe.rope, model_spec)
    return SHAPES[target].note(rank, rope_dims, (room, room if most is None else most))


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
        _kernels(plan, model_spec),
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

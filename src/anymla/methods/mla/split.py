"""One split for all layers, where a target has no other: what loses least on calibration text, over the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymla.layouts import LIMITS, SHAPES, grid_steps, most_channels
from anymla.methods.base import Facts
from anymla.methods.mla.layer_plan import LayerPlan
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA

MOST_LAYERS = 8  # that are looked at, evenly spaced
NEAR = 0.02  # of the least loss: splits that lose no more beyond it are as good


@dataclass(frozen=True)
class RopeSplit:
    """Rotated numbers of a layer's cache and, on a grid, its step."""

    rope_dims: int
    rope_step: int | None


def open_splits(plan: LayerPlan, settings: MLA, model: ModelSpec) -> list[RopeSplit]:
    """Every split that the plan of one layer leaves open; none where each layer may have its own."""
    limits = LIMITS[settings.target]
    if not limits.uniform:
        return []
    dims = plan.rope_choices if plan.rope_dims is None else (plan.rope_dims,)
    if not limits.grid:
        return [RopeSplit(rope_dims, None) for rope_dims in dims]
    most = most_channels(model)
    steps = (plan.rope_step,) if plan.rope_step is not None else None
    return [RopeSplit(rope_dims, step) for rope_dims in dims for step in steps or grid_steps(rope_dims, most)]


def agreed(
    layers: tuple[LayerPlan | None, ...], settings: MLA, model: ModelSpec, facts: Facts
) -> tuple[LayerPlan | None, ...]:
    """``layers`` with the one split that loses least over the layers of ``facts``, where the target needs one.

    One that the target's engines prefer is taken where it loses hardly more.

    ``facts``: what :class:`SplitSurvey` gave of each layer.
    """
    first = next(layer for layer in layers if layer is not None)
    if not (splits := open_splits(first, settings, model)):
        return layers
    ranks = [first.cached_numbers - split.rope_dims for split in splits]
    lost = [sum(fact["lost"][number] for fact in facts if fact is not None) for number in range(len(splits))]
    near = [number for number, each in enumerate(lost) if each <= (1 + NEAR) * min(lost)]
    preferred = [number for number in near if SHAPES[settings.target].preferred(ranks[number])]
    best = splits[min(preferred or near, key=lost.__getitem__)]
    rank = first.cached_numbers - best.rope_dims
    update = {"rope_dims": best.rope_dims, "kv_rank": rank, "rope_choices": (), "rope_step": best.rope_step}
    return tuple(layer and layer.model_copy(update=update) for layer in layers)

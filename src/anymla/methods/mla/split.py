"""One split for all layers, where a target has no other: what loses least on calibration text, over the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymla.layouts import LIMITS, grid_steps, most_channels
from anymla.methods.mla.plan import LayerPlan
from anymla.methods.mla.settings import MLA
from anymla.model_run.stream import pass_through
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.sweep.sequence import Sequence, Streams

MOST_LAYERS = 8  # that are looked at, evenly spaced

Split = tuple[int, int | None]  # rope dims and, on a grid, its step


def open_splits(plan: LayerPlan, recipe: MLA, model_spec: ModelSpec) -> list[Split]:
    """Every split that the plan of one layer leaves open; none where each layer may have its own."""
    limits = LIMITS[recipe.target]
    if not limits.uniform:
        return []
    dims = plan.rope_choices if plan.rope_dims is None else (plan.rope_dims,)
    if not limits.grid:
        return [(rope_dims, None) for rope_dims in dims]
    most = most_channels(model_spec)
    steps = (plan.rope_step,) if plan.rope_step is not None else None
    return [(rope_dims, step) for rope_dims in dims for step in steps or grid_steps(rope_dims, most)]


def best_split(sequence: Sequence, streams: Streams, splits: list[Split]) -> Split:
    """The one of ``splits`` with the least loss of the hidden states behind attention, summed over some layers.

    Runs the original once more; ``streams`` begin anew behind it.
    """
    if len(splits) == 1:
        return splits[0]
    lost = dict.fromkeys(splits, 0.0)
    total = len(sequence.layers)
    seen = {index * total // min(total, MOST_LAYERS) for index in range(min(total, MOST_LAYERS))}
    for index in range(max(seen) + 1):
        layer, arguments = sequence.layers[index], sequence.arguments[index]
        with sequence.source.layer(layer):
            if index in seen:
                step = sequence.step(index)
                step.measure(index, streams.original, streams.converted)
                for split in splits:
                    lost[split] += step.share_lost(*split)
                step.close()
            else:
                pass_through(layer, streams.original, arguments, 1)
            pass_through(layer, streams.converted, arguments, 1)
    streams.restore(0)
    return min(splits, key=lambda split: lost[split])

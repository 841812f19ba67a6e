"""The trade-off of a cache of codes: bytes against predicted error, at several costs of decoding. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from anymla.account import account
from anymla.errors import InfeasibleError
from anymla.methods.base import Facts
from anymla.methods.cache_coding.explain import coded_layers
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.methods.cache_coding.transform_coding import TransformCoding

DecodeCost = float | Literal["any"]

BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625, 0.03125)  # of the original's bytes in 16 bits
COSTS = (1.0, 2.0)  # multiples of the original's multiply-adds; and "any"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan at one budget and one cost of decoding; its sizes are None where no plan can meet both.

    ``kv_cache``, ``decode_cost``: the settings. ``multiply_adds``: over the original's, of all layers.
    ``predicted_kl``: nats per token that the quantisers lose by their expected error. It adds up all layers' errors as
    if they were small and independent.
    """

    kv_cache: float
    decode_cost: DecodeCost
    cache_bytes_per_token: int | None = None
    multiply_adds: float | None = None
    predicted_kl: float | None = None


def decode_costs(method: TransformCoding) -> tuple[DecodeCost, ...]:
    """Those of a curve: the usual ones, and the method's own."""
    own: set[DecodeCost] = {method.decode_cost}
    return (*sorted({*COSTS, *(cost for cost in own if cost != "any")}), "any")


def curve(
    method: TransformCoding, model: ModelSpec, facts: Facts, told: Callable[[int, int], None] | None = None
) -> list[Point]:
    """Plans at the usual budgets, and at the method's own, for every cost of decoding.

    Args:
        method: the settings.
        model: the original.
        facts: what the survey gathered, for all of :func:`decode_costs`.
        told: called after each plan with (plans done, plans); one of a large model takes seconds.
    """
    budgets = sorted({*BUDGETS, method.kv_cache} - {1.0}, reverse=True)
    asked, points = [*product(decode_costs(method), budgets)], []
    for cost, budget in asked:
        points.append(_point(method, model, facts, budget, cost))
        if told is not None:
            told(len(points), len(asked))
    return points


def _point(method: TransformCoding, model: ModelSpec, facts: Facts, budget: float, cost: DecodeCost) -> Point:
    asked = method.model_copy(update={"kv_cache": budget, "decode_cost": cost})
    try:
        plan = asked.plan(model, facts)
    except InfeasibleError:
        return Point(kv_cache=budget, decode_cost=cost)
    operations = [layer["multiply_adds"] for layer in coded_layers(plan.after)]
    before, after = (sum(each[when] for each in operations) for when in ("before", "after"))
    return Point(
        kv_cache=budget,
        decode_cost=cost,
        cache_bytes_per_token=account(plan.after).cache_bytes_per_token,
        multiply_adds=after / before,
        predicted_kl=sum(layer.predicted_kl for layer in plan.choices if layer is not None),
    )

"""What `anymla plan --curve` shows, on the terminal and as a page: bytes against predicted error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from anymla.cards import public_name
from anymla.report.chart import Chart, Series
from anymla.report.page import Cell, Command, Page, Section, Table, number, record
from anymla.report.results import RESULTS
from anymla.report.tables import codes_table
from anymla.report.terminal import table
from anymla.report.units import duration, share, size, unit_of

EXPLAINED = (
    "Predicted KL is what the quantisers lose by their expected error, in nats per token, as if all errors were small "
    "and independent. It orders plans; a conversion measures what they lose."
)
NONE = "-"  # where no plan meets the budget and the cost


def curve_tables(planned: Mapping[str, Any]) -> Group:
    """The plan that the settings ask for, then one row per budget."""
    points = _by_cost(planned["curve"])
    columns = ["kv_cache", "per token", *(f"KL, {_cost(cost)}" for cost in points), "multiply-adds of each"]
    rows = []
    for same in zip(*points.values(), strict=True):
        each = [NONE if point["predicted_kl"] is None else f"{point['predicted_kl']:.3g}" for point in same]
        operations = " / ".join(_times(point) for point in same)
        rows.append((f"{same[0]['kv_cache']:g}", _held(same), *each, operations))
    shown = table("Predicted KL at other budgets, by the cost of decoding", columns, rows)
    return Group(codes_table(planned), shown, Text(EXPLAINED))


def curve_page(planned: Mapping[str, Any], content: Mapping[str, Any]) -> Page:
    """The page of a curve; ``content``: what results.json holds."""
    before, method = planned["cache_bytes_per_token"]["before"], planned["recipe"]["transform_coding"]
    return Page(
        title=f"What codes of {public_name(planned['model'])}'s KV cache will lose",
        lead=(
            f"Planned on {method['calibration_tokens']:,} tokens of calibration text in "
            f"{duration(planned['seconds'])}; no model was written. {EXPLAINED}"
        ),
        sections=(
            Section(
                heading="Bytes against predicted error",
                text="The cost of decoding is in multiply-adds of a new token per cached one. 1 is the original's.",
                charts=(_chart(planned["curve"]),),
                tables=(_table(planned["curve"], before),),
            ),
            Section(heading="The commands", commands=tuple(_commands(planned["model"], content))),
            record(RESULTS, content),
        ),
    )


def _by_cost(points: Sequence[Mapping[str, Any]]) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for point in points:
        found.setdefault(point["decode_cost"], []).append(point)
    return found


def _cost(cost: float | str) -> str:
    return "any cost" if cost == "any" else f"cost {cost:g}"


def _times(point: Mapping[str, Any]) -> str:
    return NONE if point["multiply_adds"] is None else f"{point['multiply_adds']:.2f}"


def _held(points: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of the plans at one budget, which padding lets differ."""
    held = sorted({point["cache_bytes_per_token"] for point in points if point["cache_bytes_per_token"] is not None})
    return " to ".join(dict.fromkeys(size(each) for each in (held[:1] + held[-1:]))) or NONE


def _chart(points: Sequence[Mapping[str, Any]]) -> Chart:
    known = [point for point in points if point["predicted_kl"]]
    unit, each = unit_of(point["cache_bytes_per_token"] for point in known)
    return Chart(
        title="Predicted KL against bytes of the cache",
        x_label=f"cache per token ({unit})",
        y_label="predicted KL, log scale",
        series=tuple(
            Series(
                name=_cost(cost),
                points=tuple((point["cache_bytes_per_token"] / each, point["predicted_kl"]) for point in same),
            )
            for cost, same in _by_cost(known).items()
        ),
        log=True,
        from_zero=True,
    )


def _table(points: Sequence[Mapping[str, Any]], before: int) -> Table:
    columns = ("decode_cost", "kv_cache", "cache per token", "of the original", "multiply-adds", "predicted KL")
    rows = []
    for point in points:
        held, lost = point["cache_bytes_per_token"], point["predicted_kl"]
        asked = (Cell(f"{point['decode_cost']}"), number(f"{point['kv_cache']:g}", point["kv_cache"]))
        got = (
            number(NONE if held is None else size(held), held),
            number(NONE if held is None else share(held, before), held),
            number(_times(point), point["multiply_adds"]),
            number(NONE if lost is None else f"{lost:.3g}", lost),
        )
        rows.append((*asked, *got))
    return Table(columns=columns, rows=tuple(rows))


def _commands(model: str, content: Mapping[str, Any]) -> Iterator[Command]:
    yield Command("Plans it again", content["command"])
    convert = f"anymla convert {model} -o OUT --kv-cache BUDGET --decode-cost COST"
    yield Command("Converts, with a budget and a cost of the table", convert)

"""Tables on the terminal: no number is wrapped or cut, whatever the width."""

import pytest
from rich.console import Console

from anymla.methods.base import method_of
from anymla.pipeline import plan_codes
from anymla.report.tables import CODE_COLUMNS, codes_table
from anymla.report.terminal import table
from tests.damage import BUNDLED

ROWS = [
    ["a/rather/long/path/of/a/model/that/somebody/converted", "1.21 KiB", "12,345,678", "-> 1.07M", "99.95%", "0.0012"],
    ["b", "7 B", "9", "1", "0.1%", "3.1415"],
]
COLUMNS = ["model", "cache per token", "cache at 8,192 tokens", "multiply-adds", "same top token", "KL"]


def drawn(shown, width):
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_numbers_are_whole_at_every_width(width):
    text = drawn(table("A title", COLUMNS, ROWS), width)
    assert all(len(line) <= width for line in text.splitlines())
    for row in ROWS:
        for cell in row[1:]:
            assert cell in text
    heads = [line for line in text.splitlines() if "model" in line.split()[:1]]
    assert len(heads) == 1 if width >= 120 else len(heads) >= 1
    assert "…" not in text


def test_columns_without_room_stand_below():
    tables = drawn(table("Codes", CODE_COLUMNS, [["0-29", "axes of 3", "180", "1.75", "45"] * 2]), 80)
    assert tables.count("layers") == 2 and all(len(line) <= 80 for line in tables.splitlines())
    assert (
        drawn(table("Codes", CODE_COLUMNS, [["0-29", "axes of 3", "180", "1.75", "45"] * 2]), 120).count("layers") == 1
    )


def test_a_plan_that_codes_nothing_says_so():
    whole = method_of("transform_coding", {"kv_cache": 1.0})
    text = drawn(codes_table(plan_codes(BUNDLED, whole)), 80)
    assert "no layer is coded" in " ".join(text.split()) and "numbers" not in text

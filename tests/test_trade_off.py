"""The trade-off curve of codes: plans that conversions make, in the order of what these lose, on a page."""

import json

import pytest
import torch

import anymla
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.errors import InfeasibleError, OutputError
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.cache_coding.curve import BUDGETS, Point, curve
from tests.damage import BUNDLED, TRAIN, VALID, run_main
from tests.pages import check_page

FEW = {"calibration": str(TRAIN), "calibration_tokens": 2048, "calibration_length": 64}
OPTIONS = ("--calibration", str(TRAIN), "--calibration-tokens", "2048", "--calibration-length", "64")


@pytest.fixture(scope="module")
def planned():
    told = []
    method = TransformCoding.of({"kv_cache": 0.2, "decode_cost": 1.5, **FEW}, "settings")
    found = anymla.plan_curve(BUNDLED, method, progress=lambda *step: told.append(step))
    passes = [(step, 5, what) for what in ("calibration, pass", "calibration, backward pass") for step in range(1, 6)]
    assert told == [*passes, *((step, 32, "plan") for step in range(1, 33))]
    return found


def test_every_budget_and_every_cost_is_met(planned):
    costs = {point["decode_cost"] for point in planned["curve"]}
    assert costs == {1.0, 1.5, 2.0, "any"}
    for cost in costs:
        points = [point for point in planned["curve"] if point["decode_cost"] == cost]
        assert [point["kv_cache"] for point in points] == sorted({*BUDGETS, 0.2}, reverse=True)
        for point in points:
            assert 0 < point["cache_bytes_per_token"] <= point["kv_cache"] * 1280
            assert cost == "any" or 0 < point["multiply_adds"] <= cost
        lost = [point["predicted_kl"] for point in points]
        assert lost == sorted(lost)
    own = next(point for point in planned["curve"] if (point["kv_cache"], point["decode_cost"]) == (0.2, 1.5))
    held = sum(layer[kind]["bytes"] for layer in planned["layers"] for kind in ("keys", "values"))
    assert own["cache_bytes_per_token"] == held == planned["cache_bytes_per_token"]["after"]


def test_the_order_of_predicted_losses_is_that_of_measured_ones(planned, tmp_path, record_property):
    predicted, measured = [], []
    for point in planned["curve"]:
        asked = {name: point[name] for name in ("kv_cache", "decode_cost")}
        if asked["kv_cache"] in (0.25, 0.125, 0.03125) and asked["decode_cost"] != 1.5:
            done = anymla.convert(BUNDLED, tmp_path / "out", codec="transform_coding", overwrite=True, **asked, **FEW)
            assert sum(layer["predicted_kl"] for layer in done.layers) == pytest.approx(point["predicted_kl"], rel=1e-6)
            predicted.append(point["predicted_kl"])
            measured.append(done.after.kl)
    ranks = [torch.tensor(each).argsort().argsort().double() for each in (predicted, measured)]
    spearman = torch.stack(ranks).corrcoef()[0, 1].item()
    record_property("spearman", spearman)
    record_property("measured over predicted", [kl / each for kl, each in zip(measured, predicted, strict=True)])
    assert len(predicted) == 9 and spearman > 0.9


def test_the_command_shows_the_curve_and_writes_a_page(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    asked = ["plan", str(BUNDLED), "--curve", "-o", str(tmp_path / "curve"), *OPTIONS]
    run = run_main([*asked], monkeypatch, capfd)
    assert run.code == 0, run.err
    told = json.loads((tmp_path / "curve" / "results.json").read_text())
    for shown in ("KL, cost 1", "KL, any cost", "that a conversion with these settings chooses", "0.03125"):
        assert shown in run.out
    page = check_page(tmp_path / "curve" / "report.html", told)
    assert "Predicted KL against bytes of the cache" in " ".join(page.text)
    assert [attributes for tag, attributes in page.tags if tag == "svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--codec", "none"), "the step here is mla"),
        (("--target", "gguf"), "the step here is mla (only this step has the setting target)"),
        (("--codec", "kvquant"), "the step here is kvquant"),
        (("-o", str(VALID)), "-o"),
        (("--kv-cache", "0.001"), "smallest possible is kv_cache"),
    ],
)
def test_what_has_no_curve_is_refused(options, named, monkeypatch, capfd):
    run = run_main(["plan", str(BUNDLED), "--curve", *options], monkeypatch, capfd)
    assert run.code == 1 and named in run.err and len(run.err.splitlines()) == 1


def test_a_point_that_no_plan_meets_has_no_sizes(monkeypatch):
    def refuse(*_):
        raise InfeasibleError("too few bytes")

    monkeypatch.setattr(TransformCoding, "plan", refuse)
    (first, *_) = curve(TransformCoding.of({}, "settings"), None, [])
    assert first == Point(kv_cache=0.5, decode_cost=1.0)


def test_a_budget_that_codes_nothing_has_a_curve(monkeypatch):
    asked = []

    def surveyed(method, *_, **__):
        asked.append(method.plan(read_model_spec(read_config(BUNDLED))).choices)
        raise OSError("no room")

    monkeypatch.setattr("anymla.sweep.run.surveyed", surveyed)
    with pytest.raises(OutputError, match=r"temporary files could not be written to .*: no room"):
        anymla.plan_curve(BUNDLED, TransformCoding.of({"kv_cache": 1.0, **FEW}, "settings"))
    assert len(asked[0]) == 5 and None not in asked[0]

"""Every method keeps to the contract; a new one is one file, and is everywhere at once."""

from __future__ import annotations

import gc
import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import anymla
import anymla.methods
from anymla.methods.base import all_methods
from tests.damage import TRAIN, VALID, run_main
from tests.families import FAST, make_model, save_model
from tests.method_contract import PROMISES, Case, Sample
from tests.methods_page import PAGE, methods_page

HALF = {"mla": {"kv_cache": 0.5, **FAST}}
TINY = {
    "data": [str(TRAIN)],
    "eval_data": str(VALID),
    "eval_tokens": 256,
    "tokens": 2048,
    "length": 64,
    "batch": 4,
    "learning_rate": 0.001,
    "save_every": 1,
    "eval_every": 1,
    "device": "cpu",
}
FAST_RUN = {name: FAST[name] for name in ("calibration_tokens", "calibration_length")}
UNPROTECTED = {"protect_first": 0, "protect_last": 0}
SAMPLES = {  # one line for each method
    "kv_heads": Sample({"kv_heads": 1, "variant": "post", **FAST_RUN}, {"kv_cache": 1.0, **FAST_RUN}),
    "mka": Sample({"remove": 1, "strategy": "merge", **UNPROTECTED, **FAST_RUN}, {"remove": 0, **FAST_RUN}),
    "saap": Sample({"neurons": 0.5, "heads": 0.7, "multiple": 8, **FAST_RUN}, {"neurons": 1.0, **FAST_RUN}),
    "mla": Sample({"kv_cache": 0.5, **FAST}, {"kv_cache": 1.0, **FAST}),
    "lorc": Sample({"kv_cache": 0.5, "ranks": "progressive"}, {"kv_cache": 1.0}),
    "mfa": Sample({"kv_cache": 0.5, **FAST_RUN}, {"kv_cache": 1.0, **FAST_RUN}),
    "transform_coding": Sample({"kv_cache": 0.5, "decode_cost": 2.0, **FAST_RUN}, {"kv_cache": 1.0, **FAST_RUN}),
    "kvquant": Sample({"bits": 3, **FAST_RUN}, {"bits": 16, **FAST_RUN}),
    "billm": Sample({"block_size": 16, **FAST_RUN}, {"keep": ["*"], **FAST_RUN}),
    "rtn": Sample({"bits": 3, "group": 16}, {"bits": 16}),
    "hqq": Sample({"bits": 4, "group": 16}, {"bits": 16}),
    "gptq": Sample({"bits": 4, "group": 16, **FAST_RUN}, {"bits": 16, **FAST_RUN}),
    "shared_attention": Sample({"spans": [[1, 1]], **FAST_RUN}, {"spans": [], **FAST_RUN}),
    "tune": Sample(TINY, TINY | {"learning_rate": 1e-30}, before=(HALF,)),
}
COMPOSED = {  # steps whose promises are not those of their parts
    "kvquant after mla": ("kvquant", Sample({"bits": 3, **FAST_RUN}, {"bits": 16, **FAST_RUN}, before=(HALF,))),
    "transform_coding after mla": (
        "transform_coding",
        Sample({"kv_cache": 0.125, **FAST_RUN}, {"kv_cache": 1.0, **FAST_RUN}, before=(HALF,)),
    ),
}
CASES = {name: (name, sample) for name, sample in SAMPLES.items()} | COMPOSED
TOY = '''
"""Rounds the output projection of attention to a few levels: a method for tests."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from anymla.methods.base import Changed, LayerMethod, Paper, Phase, Plan
from anymla.modeling.spec import ModelSpec


class Ignore:
    """Needs nothing of a layer."""

    def add(self, batch: Any) -> None:
        """Takes a batch."""


class Toy(LayerMethod):
    """Rounds the output projection of every attention."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[Paper] = Paper(title="Rounding for tests", arxiv="0000.00000")
    phase: ClassVar[Phase] = Phase.WEIGHTS
    summary: ClassVar[str] = "Rounds the output projection of every attention to a few levels."
    saves: ClassVar[tuple[str, ...]] = ("weights",)

    levels: int = Field(0, ge=0, description="Levels to round to; 0 for none.")

    def refuses(self, model: ModelSpec) -> str | None:
        return "it is too small" if model.hidden_size < 4 else None

    def plan(self, model: ModelSpec, facts: Any = None, choices: Any = None) -> Plan:
        return Plan(after=model, choices=tuple({"levels": self.levels} for _ in model.layers))

    def observer(self, layer: Any) -> Ignore:
        return Ignore()

    def apply(self, layer: Any, observed: Any) -> Changed:
        weight = layer.attention.o_proj.weight
        if self.levels:
            step = weight.abs().max() / self.levels
            weight.data = (weight / step).round() * step
        return Changed(spec=layer.planned, result={"layer": layer.index, "levels": self.levels})
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    folder = tmp_path_factory.mktemp("method")
    return save_model(make_model("llama", torch.float32), folder / "source")


@pytest.fixture
def toy(tmp_path):
    """The toy method, registered by its one file."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "toy.py").write_text(TOY)
    anymla.methods.__path__.append(str(tmp_path / "plugins"))
    yield Sample({"levels": 7, **FAST_RUN}, {"levels": 0, **FAST_RUN})
    anymla.methods.__path__.remove(str(tmp_path / "plugins"))
    sys.modules.pop("anymla.methods.toy", None)
    vars(anymla.methods).pop("toy", None)
    gc.collect()  # a class is known for as long as it lives


def test_every_method_is_in_the_contract():
    assert SAMPLES.keys() == all_methods().keys()


def contract():
    """Every case with every promise. Runs that are killed take long: those of two cases are not marked as slow."""
    for case, promise in product(CASES, PROMISES):
        killed = promise.__name__.startswith("a_killed_run") and case not in ("mla", "transform_coding")
        marks = [pytest.mark.slow] if killed else []
        yield pytest.param(case, promise, id=f"{case}-{promise.__name__}", marks=marks)


@pytest.mark.parametrize(("case", "promise"), contract())
def test_contract(case, promise, source, tmp_path):
    promise(Case(*CASES[case], source, source.with_name(f"{case} done")), tmp_path)


def test_a_new_method_is_one_file(toy, source, tmp_path, monkeypatch, capfd):
    """It is in the command line, in recipes, in the docs' page and on the card, and keeps to the contract."""
    listed = run_main(["methods", "--json"], monkeypatch, capfd)
    row = next(row for row in json.loads(listed.out) if row["name"] == "toy")
    assert row["paper"] == "https://arxiv.org/abs/0000.00000"
    assert (row["phase"], row["saves"], set(row["composes_with"])) == ("weights", ["weights"], {*SAMPLES})
    assert "### toy" in methods_page() and "0000.00000" in methods_page() and "`levels`" in methods_page()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nsteps:\n  - toy: {json.dumps(toy.settings)}\n")
    done = run_main(["run", str(recipe), "-o", str(tmp_path / "out"), "--json"], monkeypatch, capfd)
    assert (done.code, json.loads(done.out)["steps"][0]["name"]) == (0, "toy")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Rounding for tests" in card and "https://arxiv.org/abs/0000.00000" in card and "levels" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"  # a stock checkpoint stays one
    for promise in PROMISES:
        if promise.__name__ not in ("plans_are_pure", "a_killed_run_goes_on_to_the_same_bytes"):  # other processes
            (folder := tmp_path / promise.__name__).mkdir()
            promise(Case("toy", toy, source), folder)


def test_a_toy_after_the_conversion(toy, source, tmp_path):
    done = anymla.run(source, tmp_path / "out", steps=[HALF, {"toy": toy.settings}])
    assert [step.name for step in done.steps] == ["mla", "toy"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "anymla_llama"


def test_wrong_orders_are_refused(toy, source, tmp_path):
    with pytest.raises(anymla.errors.RecipeError, match=r"step 2, mla, cannot follow toy.*ATTENTION"):
        anymla.run(source, tmp_path / "out", steps=[{"toy": toy.settings}, HALF])


def test_the_page_of_methods_is_made_from_them():
    assert Path(PAGE).read_text(encoding="utf-8") == methods_page(), "make methods"

"""The recipes in examples/: each says what it is for and how to run it, and runs on the bundled model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

import anymla
from anymla.recipe import read_recipe
from tests.damage import BUNDLED, TRAIN, VALID
from tests.markdown import ROOT
from tests.test_docs import parse

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CALIBRATION = {"calibration_tokens": 2048, "calibration_length": 128}
SMALLER = {
    "mla": CALIBRATION | {"reconstruction_steps": 0},
    "transform_coding": CALIBRATION,
    "kv_heads": CALIBRATION,
    "lorc": {},
    "billm": CALIBRATION,
    "saap": CALIBRATION | {"multiple": 16},
    "hqq": {"group": 16},
    "tune": {"data": ["my-text.jsonl"], "tokens": 256, "length": 64, "eval_tokens": 256, "device": "cpu"},
}
each = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)


@each
def test_the_head_says_what_it_is_for_and_how_to_run_it(file):
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith(".")
    commands = [shlex.split(line.removeprefix("#")) for line in rest if line.startswith("#   anymla ")]
    assert commands[0] == ["anymla", "run", f"examples/{file.name}", "-o", "OUT"]
    for command in commands:
        parse(command[1:])


def test_each_is_in_the_table():
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{file.name}]({file.name})" in table for file in EXAMPLES)


@each
def test_it_is_a_recipe(file):
    recipe = read_recipe(file)
    assert recipe.model and recipe.steps


FIVE = ("cache-only", "extreme", "half-the-weights", "no-calibration", "stock-checkpoint")


def write_texts(folder):
    """The texts that the recipes name, in ``folder``."""
    shutil.copy(TRAIN, folder / "my-text.txt")
    shutil.copy(VALID, folder / "held-out.txt")
    lines = [json.dumps({"text": f"Once upon a time there was cat number {number}."}) for number in range(400)]
    (folder / "my-text.jsonl").write_text("\n".join(lines))


def smaller(steps):
    """The same steps with so few tokens that they take seconds."""
    return [{name: settings | SMALLER[name] for name, settings in step.items()} for step in steps]


@each
def test_it_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) | {"context": 512}
    content |= {"text_tokens": 512} if "text" in content else {}
    steps = smaller(content["steps"])
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content | {"steps": steps}))
    done = anymla.run(BUNDLED, "OUT", recipe="small.yaml")
    assert [step.name for step in done.steps] == [name for step in steps for name in step]
    account = [step.account.cache_bytes_per_token for step in done.steps]
    assert account[-1] < 1280  # the original's
    assert (done.steps[-1].quality is None) == ("text" not in content)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_killed_in_any_step(name, tmp_path):
    """And gone on from there, each recipe writes the same bytes."""
    write_texts(tmp_path)
    content = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    steps = smaller(content["steps"])
    runs = tmp_path / "runs"
    runs.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.run_kill_points",
            str(BUNDLED),
            str(runs),
            "3",
            str(len(steps)),
            json.dumps(steps),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["step"] for trial in trials] == [*range(1, len(steps) + 1)]
    for trial in trials:
        assert (trial["killed"], trial["code"], trial["different"], trial["left"]) == (True, 0, [], ["out"]), trial

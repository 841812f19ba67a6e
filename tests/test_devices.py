"""On a pretended GPU: no tensor is on the wrong device, nothing is copied in decode, and no loop waits for the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anymla
from anymla.errors import RecipeError
from tests.damage import TRAIN
from tests.pretend_kinds import CODECS, OFFLOADED, SPREAD, STEPS

ROOT = Path(__file__).parents[1]
EXACT = 1e-4  # kernels for attention differ in their last bits, and a code may then be its neighbour


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What tests/pretend_runs.py found, in a process of its own: a backend of torch stays once it is there."""
    command = [sys.executable, "-m", "tests.pretend_runs", str(tmp_path_factory.mktemp("pretend"))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("kind", [*STEPS, *CODECS])
def test_decode_copies_nothing_and_waits_for_nothing(kind, seen):
    found = seen[f"decode {kind}"]
    assert found["off"] < EXACT and not found["waits"] and not found["copies"], found


@pytest.mark.parametrize("kind", OFFLOADED)
def test_a_cache_may_leave_the_gpu_between_tokens(kind, seen):
    found = seen[f"offload {kind}"]
    assert found["off"] < EXACT and found["devices"] == ["cpu"] and not found["waits"], found


@pytest.mark.parametrize("kind", SPREAD)
def test_layers_may_be_on_two_gpus(kind, seen):
    found = seen[f"spread {kind}"]
    assert found["off"] < EXACT and found["devices"] == ["pretend:0", "pretend:1"] and not found["waits"], found
    assert all("shared_attention.py" in each for each in found["copies"]), found  # a map goes where it is used


def test_conversion_on_a_gpu_is_that_on_the_cpu_and_its_loops_do_not_wait(seen):
    assert seen["convert"]["off"] < 1e-2 and not seen["convert"]["waits"], seen["convert"]


def test_scores_are_read_once_and_not_for_each_window(seen):
    few, many = seen["score"]["waits"]
    assert seen["score"]["off"] < EXACT and few == many, seen["score"]


@pytest.mark.parametrize("stage", ["layers", "logits"])
def test_a_step_of_tuning_does_not_wait(stage, seen):
    found = seen[f"tune {stage}"]
    assert found["off"] < EXACT and not found["waits"] and not found["copies"], found


def test_tuning_refuses_a_gpu_that_its_trainer_would_pass_over(tmp_path):
    with pytest.raises(RecipeError, match="--device cuda:1: tuning takes the first GPU"):
        anymla.tune(tmp_path, tmp_path / "out", teacher=tmp_path, data=str(TRAIN), device="cuda:1")

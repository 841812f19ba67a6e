"""A tuning shared among processes gives what one process gives; one that was killed goes on as if it had not been."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import anymla
from anymla.errors import OutputError
from tests.damage import TRAIN

SETTINGS = {
    "data": [str(TRAIN)],
    "tokens": 1024,
    "layerwise": 0.25,
    "length": 32,
    "batch": 4,
    "micro_batch": 2,
    "eval_tokens": 256,
    "learning_rate": 0.003,
    "save_every": 2,
    "eval_every": 4,
    "device": "cpu",
}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """An undisturbed tuning by one process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    anymla.tune(pair[1], folder, teacher=pair[0], **SETTINGS)
    return lines_of(folder)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(pair, folder, *ways, launch=()):
    arguments = [str(pair[1]), str(pair[0]), str(folder), json.dumps(SETTINGS), *ways]
    command = [sys.executable, *launch, "-m", "tests.tune_processes", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=ONE_THREAD)


def assert_alike(lines, others):
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others):
        assert line.keys() == other.keys()
        for name in line.keys() - {"stage", "grad_norm"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), (line, other)


@pytest.mark.slow
def test_killed_and_gone_on(pair, whole, tmp_path):
    """The step behind the last checkpoint has the very same loss, and all others after it."""
    assert run(pair, tmp_path, "ddp-6").returncode == -9
    folder = tmp_path / ".ddp.partial" / ".work"
    assert json.loads((folder / "progress.json").read_text())["checkpoints"] == [["logits", 2]]
    with pytest.raises(OutputError, match=r"recipe tokens 1024 and not 2048.*--restart"):
        anymla.tune(pair[1], tmp_path / "ddp", teacher=pair[0], parallel="ddp", **SETTINGS | {"tokens": 2048})
    seen = []
    anymla.tune(pair[1], tmp_path / "ddp", teacher=pair[0], progress=seen.append, parallel="ddp", **SETTINGS)
    assert [now.step for now in seen] == [4, 5, 6, 7, 8]
    assert seen[0].loss is None
    assert lines_of(tmp_path / "ddp") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["ddp"]


@pytest.mark.slow
def test_two_processes_equal_one(pair, whole, tmp_path):
    assert run(pair, tmp_path, "ddp", "fsdp-8", launch=LAUNCH).returncode != 0  # the last way kills itself
    assert_alike(lines_of(tmp_path / "ddp"), whole)
    checkpoints = tmp_path / ".fsdp.partial" / ".work" / "logits"
    shards = [path.name for path in (checkpoints / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp")]
    assert len(shards) == 2
    done = run(pair, tmp_path, "fsdp", launch=LAUNCH)
    assert done.returncode == 0, done.stderr
    assert_alike(lines_of(tmp_path / "fsdp"), whole)
    shutil.rmtree(tmp_path / "ddp")
    assert [path.name for path in tmp_path.iterdir()] == ["fsdp"]

"""A conversion that was stopped goes on, and ends with the same bytes; what cannot go on says so."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import anymla
from anymla.demo import bundled_model
from anymla.errors import CheckpointError, OutputError
from anymla.io import work as work_files
from anymla.model_run.activations import Activations, Budget
from tests.damage import Run
from tests.families import make_model, save_model

SETTINGS = {
    "kv_cache": 0.5,
    "calibration_tokens": 1024,
    "calibration_length": 64,
    "max_shard_size": "250KB",
    "reconstruction_steps": 2,
}
COMMAND = (
    "--kv-cache 0.5 --calibration-tokens 1024 --calibration-length 64 --max-shard-size 250KB --reconstruction-steps 2"
)


class Stop(Exception):
    """Stands for any end that Python sees."""


def weights(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("conversion.json", "report.html")
    }


def after(layers, error):
    """A progress callback that raises ``error`` once ``layers`` layers are done."""

    def progress(done, total, result):
        if done == layers:
            raise error

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed conversion."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    anymla.convert(bundled_model(), folder, **SETTINGS)
    return weights(folder)


@pytest.fixture
def stopped(tmp_path):
    """A conversion that was stopped behind two layers of five."""
    with pytest.raises(Stop):
        anymla.convert(bundled_model(), tmp_path / "out", progress=after(2, Stop()), **SETTINGS)
    assert (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


@pytest.mark.slow
def test_killed_anywhere(tmp_path):
    arguments = [str(bundled_model()), str(tmp_path), "7", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layers"] == [1, 2, 3, 4, 5]
    assert report["points"] > 60
    assert len(report["trials"]) == 10
    for trial in report["trials"]:
        assert (trial["killed"], trial["code"], trial["different"], trial["left"]) == (True, 0, [], ["out"]), trial
    assert len({str(trial["first_report"]) for trial in report["trials"]}) > 1  # they did go on from various layers


def test_goes_on_at_the_next_layer(stopped, whole):
    seen, notes = [], []
    anymla.convert(
        bundled_model(), stopped, progress=lambda done, *_: seen.append(done), notify=notes.append, **SETTINGS
    )
    assert seen == [2, 3, 4, 5]
    assert notes == ["this goes on with what was kept: 2 of 5 layers; --restart begins anew"]
    assert weights(stopped) == whole
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kv_cache": 0.25}, "recipe kv_cache 0.5 and not 0.25"),
        ({"calibration_tokens": 2048}, "recipe calibration_tokens 1024"),
        ({"max_shard_size": "1MB"}, "--max-shard-size 250000"),
    ],
)
def test_another_recipe_is_not_mixed_in(stopped, changes, word):
    before = weights(stopped.parent / ".out.partial" / ".work")
    with pytest.raises(OutputError, match=word) as refused:
        anymla.convert(bundled_model(), stopped, **SETTINGS | changes)
    assert "--restart" in str(refused.value)
    assert weights(stopped.parent / ".out.partial" / ".work") == before
    anymla.convert(bundled_model(), stopped, restart=True, **SETTINGS | changes)
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


def test_another_source_is_not_mixed_in(tmp_path, whole):
    source = shutil.copytree(bundled_model(), tmp_path / "source")
    with pytest.raises(Stop):
        anymla.convert(source, tmp_path / "out", progress=after(1, Stop()), **SETTINGS)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1  # one bit of one weight
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(OutputError, match=r"another source.*--restart"):
        anymla.convert(source, tmp_path / "out", **SETTINGS)


def test_a_shard_that_disappears(tmp_path):
    model = make_model("llama", torch.float32, num_hidden_layers=4)
    source = save_model(model, tmp_path / "source", max_shard_size="100KB")
    expected = tmp_path / "expected"
    anymla.convert(source, expected, **SETTINGS)
    shard = max(source.glob("model-*.safetensors"))
    content = shard.read_bytes()

    def remove(done, total, result):
        if done == 2:
            for file in source.glob("model-*.safetensors"):
                file.rename(file.with_suffix(".away"))

    with pytest.raises(CheckpointError, match=r"can no longer be read.*2 of 4 layers are kept"):
        anymla.convert(source, tmp_path / "out", progress=remove, **SETTINGS)
    for file in source.glob("*.away"):
        file.rename(file.with_suffix(".safetensors"))
    assert shard.read_bytes() == content
    anymla.convert(source, tmp_path / "out", **SETTINGS)
    assert weights(tmp_path / "out").keys() == weights(expected).keys()
    assert {k: v for k, v in weights(tmp_path / "out").items() if k != "README.md"} == {
        k: v for k, v in weights(expected).items() if k != "README.md"
    }


def test_disk_full_behind_some_layers(tmp_path, whole, monkeypatch):
    commit, calls = work_files.WorkFolder.commit, []

    def full(self, **changes):
        calls.append(changes)
        if len(self.progress["layers"]) == 3:
            raise OSError(28, os.strerror(28))
        commit(self, **changes)

    monkeypatch.setattr(work_files.WorkFolder, "commit", full)
    with pytest.raises(OutputError, match=r"No space left on device.*3 of 5 layers are kept: the same command"):
        anymla.convert(bundled_model(), tmp_path / "out", **SETTINGS)
    monkeypatch.undo()
    anymla.convert(bundled_model(), tmp_path / "out", **SETTINGS)
    assert weights(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_file_size_limit_behind_the_layers(tmp_path):
    """The layers' files are small enough, the shard that they fill is not."""
    command = [sys.executable, "-c", "from anymla.cli import main; main()", "convert", str(bundled_model()), "-o"]
    command += [str(tmp_path / "out"), "--kv-cache", "0.5", "--calibration-tokens", "512"]
    command += ["--reconstruction-steps", "2"]
    limit = 300_000

    def run(**options):
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)

    done = run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    said = Run.of(done.returncode, done.stdout, done.stderr)
    assert (said.code, said.err.count("\n")) == (1, 1), said
    assert "5 of 5 layers are kept" in said.err
    assert run().returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_the_work_and_say_so(tmp_path, sent):
    command = [sys.executable, "-c", "from anymla.cli import main; main()", "convert", str(bundled_model()), "-o"]
    command += [str(tmp_path / "out"), "--kv-cache", "0.5", "--calibration-tokens", "8192"]
    process = subprocess.Popen(
        [*command, "--reconstruction-steps", "20"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    progress, deadline = tmp_path / ".out.partial" / ".work" / "progress.json", time.monotonic() + 120
    while not progress.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    message = Run.of(0, "", process.communicate(timeout=60)[1]).err
    assert process.returncode == 130
    assert message.count("\n") == 1, message
    assert "layers are kept: the same command goes on" in message
    assert progress.is_file()


def test_only_one_at_a_time(stopped):
    work = work_files.WorkFolder(stopped)
    work.open(
        json.loads((stopped.parent / ".out.partial/.work/progress.json").read_text())["fingerprint"], restart=False
    )
    with pytest.raises(OutputError, match="another conversion"):
        anymla.convert(bundled_model(), stopped, **SETTINGS)


def test_activations_in_files_give_the_same_bytes(tmp_path, whole):
    anymla.convert(bundled_model(), tmp_path / "out", max_memory="1KB", **SETTINGS)
    assert weights(tmp_path / "out") == whole


def test_activations_in_files_go_on(tmp_path, whole):
    with pytest.raises(Stop):
        anymla.convert(bundled_model(), tmp_path / "out", max_memory="300KB", progress=after(3, Stop()), **SETTINGS)
    anymla.convert(bundled_model(), tmp_path / "out", max_memory="300KB", **SETTINGS)
    assert weights(tmp_path / "out") == whole


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_stream_is_read_as_it_was_until_it_is_saved(tmp_path, memory):
    stream = Activations((6, 4, 3), torch.float32, "cpu", Budget(memory, tmp_path), "stream")
    values = torch.randn(6, 4, 3)
    for start in range(0, 6, 2):
        stream[start : start + 2] = values[start : start + 2]
    stream.save(tmp_path / "first")
    assert torch.equal(torch.cat(list(stream.split(4))), values)
    stream[2:4] = values[2:4] + 1
    again = Activations((6, 4, 3), torch.float32, "cpu", Budget(memory, tmp_path), "other")
    again.restore(tmp_path / "first")
    assert torch.equal(again[0:6], values)


def test_memory_budget_must_be_a_size(tmp_path):
    with pytest.raises(OutputError, match="--max-memory lots"):
        anymla.convert(bundled_model(), tmp_path / "out", max_memory="lots", **SETTINGS)

"""Calibration split over processes gives what one process gives."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from anymla.distributed import all_sum, first_decides, from_first, rank, world
from anymla.errors import TextError
from anymla.sweep.layer import CalibrationSplit
from anymla.sweep.streams import own_windows
from tests.families import make_model, save_model


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_processes_equal_one(tmp_path, family):
    source = save_model(make_model(family, head_dim=8), tmp_path / "source")
    run("-m", "tests.two_processes", source, tmp_path / "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*launch, "-m", "tests.two_processes", source, tmp_path / "two")
    one = torch.load(tmp_path / "one-moments-0.pt", weights_only=True)
    for part in (0, 1):
        two = torch.load(tmp_path / f"two-moments-{part}.pt", weights_only=True)
        for name, value in one[0].items():
            size = torch.as_tensor(value).abs().max()
            torch.testing.assert_close(two[0][name], value, rtol=1e-10, atol=1e-12 * size)
    # Adam also takes (small) steps where the gradient is rounding alone, as for key biases
    for kind, tolerance in (("", {"rtol": 1e-6, "atol": 1e-8}), ("-stepped", {"rtol": 1e-4, "atol": 1e-4})):
        first, second = (load_file(tmp_path / f"{run}{kind}" / "model.safetensors") for run in ("one", "two"))
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], **tolerance)


def test_alone_everything_is_the_identity():
    values = torch.randn(3, dtype=torch.complex128)
    assert (rank(), world(), first_decides("x")) == (0, 1, "x")
    assert all_sum(values) is values
    assert from_first(values) is values


def test_parts_are_disjoint_and_together_everything(monkeypatch):
    windows = torch.arange(37).view(37, 1)
    split = CalibrationSplit.of(37)
    found = {"fit": [], "choice": [], "held_out": []}
    monkeypatch.setattr("anymla.sweep.streams.world", lambda: 3)
    for number in range(3):
        monkeypatch.setattr("anymla.sweep.streams.rank", lambda number=number: number)
        own, part = own_windows(windows, split)
        for kind in found:
            found[kind] += own[getattr(part, kind)].flatten().tolist()
    for kind, numbers in found.items():
        assert sorted(numbers) == windows[getattr(split, kind)].flatten().tolist()


def test_more_processes_than_windows_to_choose_on(monkeypatch):
    monkeypatch.setattr("anymla.sweep.streams.world", lambda: 3)
    with pytest.raises(TextError, match="3 processes"):
        own_windows(torch.zeros(8, 4), CalibrationSplit.of(8))

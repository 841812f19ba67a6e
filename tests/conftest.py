"""Shared set-up: one thread per worker, no network."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded; a GPU runs the same tests compiled
from transformers import AutoModelForCausalLM

import anymla
from anymla.demo import bundled_model
from tests.damage import run_main
from tests.families import FAST, make_model, save_model
from tests.other_process import WithoutAnymla

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def original():
    """The bundled trained model."""
    return AutoModelForCausalLM.from_pretrained(bundled_model()).eval()


@pytest.fixture(scope="session")
def converted_folder(tmp_path_factory):
    """The bundled model at a quarter of its cache."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    anymla.convert(
        bundled_model(), folder, kv_cache=0.25, calibration_tokens=8192, calibration_length=128, reconstruction_steps=10
    )
    return folder


@pytest.fixture(scope="session")
def converted(converted_folder):
    """The converted model, loaded."""
    return AutoModelForCausalLM.from_pretrained(converted_folder).eval()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A tiny original and its conversion at half the cache."""
    folder = tmp_path_factory.mktemp("pair")
    source = save_model(make_model("llama", torch.float32), folder / "source")
    anymla.convert(source, folder / "converted", kv_cache=0.5, **FAST)
    return source, folder / "converted"


@pytest.fixture(name="anymla")
def successful(monkeypatch, capfd):
    """Runs a command in this process; it must go well and say on stderr how far it is and no more. Gives its stdout."""

    def run(*arguments):
        done = run_main([str(argument) for argument in arguments], monkeypatch, capfd)
        assert (done.code, done.err) == (0, "")
        return done.out

    return run


@pytest.fixture(scope="session")
def without_anymla(tmp_path_factory):
    """A process that cannot import anymla."""
    return WithoutAnymla(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="session", params=[0.5, 0.3125])
def stories(request, tmp_path_factory):
    """The bundled model converted for DeepSeek's layout, and its export."""
    folder, share = tmp_path_factory.mktemp("stories"), request.param
    settings = {"calibration_tokens": 8192, "calibration_length": 128, "reconstruction_steps": 10}
    report = anymla.convert(bundled_model(), folder / "converted", kv_cache=share, target="deepseek", **settings)
    done = anymla.export(folder / "converted", folder / "export")
    return SimpleNamespace(
        share=share, report=report, done=done, converted=folder / "converted", export=folder / "export"
    )

"""What a newcomer meets first: the greeting, the doctor, grouped help, the package itself."""

import importlib.metadata
import json
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec

import pytest

import anymla
from anymla import doctor
from anymla.cli import command_line, groups, out
from anymla.errors import RecipeError, TextError
from anymla.modeling.c_library import library
from tests.damage import run_main
from tests.markdown import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MOST_BYTES = 5 << 20  # of the wheel


@pytest.fixture
def offline(monkeypatch):
    """No socket connects."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def installed(monkeypatch):
    """Changes what seems to be installed: a version for a name, None for absent."""

    def change(**versions):
        def version(name, real=importlib.metadata.version):
            found = versions.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(doctor, "version", version)

    return change


def test_anymla_alone_shows_the_next_commands(monkeypatch, capfd):
    run = run_main([], monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    shown = run.out.splitlines()
    commands = [line.split()[1] for line in shown if line.startswith("  anymla ")]
    assert commands == ["demo", "inspect", "convert", "chat"] and len(shown) < 12
    assert "anymla doctor" in run.out and "anymla --help" in run.out


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "anymla", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"anymla {anymla.__version__}\n")


def test_doctor(offline, monkeypatch, capfd):
    monkeypatch.setattr(out, "width", 200)
    found = json.loads(run_main(["doctor", "--json"], monkeypatch, capfd).out)
    assert found["anymla"] == anymla.__version__ and found["missing"] == []
    assert set(found["extras"]) == set(PROJECT["optional-dependencies"])
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["memory_bytes"] > 1 << 28
    assert {each["dtype"] for each in found["dtypes"]} == {"bfloat16", "float16"}
    assert all(disk["free_bytes"] > 0 for disk in found["disks"]) and len(found["disks"]) == 2
    assert {each["name"] for each in found["engines"]} >= {"vLLM", "llama.cpp"}
    run = run_main(["doctor"], monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    assert all(word in run.out for word in ("torch", "transformers", "bfloat16", "free disk", "llama.cpp"))
    assert found["codes_in_c"] is (library() is not None) and "caches of codes" in run.out
    missing = [each["install"] for each in found["engines"] if not each["found"]]
    assert missing and all(f"not found: {how}" in run.out for how in missing)


def test_doctor_says_how_to_get_what_is_missing(installed, monkeypatch, capfd):
    monkeypatch.setattr(out, "width", 200)
    installed(gguf=None, torch=None)
    run = run_main(["doctor"], monkeypatch, capfd)
    assert run.code == 1
    assert "pip install 'anymla[gguf]'" in run.out and "MISSING: pip install 'torch>=" in run.out
    installed(transformers="5.1.0")
    found = json.loads((run := run_main(["doctor", "--json"], monkeypatch, capfd)).out)
    assert run.code == 1 and found["missing"][0].startswith("transformers>=")


def test_doctor_knows_a_transformers_that_was_not_tested(installed, monkeypatch, capfd):
    installed(transformers="5.99.0")
    run = run_main(["doctor", "--json"], monkeypatch, capfd)
    found = json.loads(run.out)
    assert run.code == 0 and found["transformers_tested"] is False and found["missing"] == []


def test_doctor_finds_engines(monkeypatch, tmp_path):
    (program := tmp_path / "llama-server").write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(doctor._found(("anymla", "no_such_module"), ("llama-server", "llama-cli"))) == [
        "Python module anymla",
        str(program),
    ]


def parameters():
    """Every option of every command, but --help."""
    for name, command in command_line().commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield name, parameter.name


@pytest.mark.parametrize("command", ["convert", "eval", "tune", "run", "export"])
def test_help_is_grouped(command, monkeypatch, capfd):
    text = run_main([command, "--help"], monkeypatch, capfd).out
    heads = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == [name for name in ("Arguments", *groups.GROUPS, groups.REST) if name in heads]
    assert {"What", "Resources", "Output"} - {"Resources" if command == "run" else ""} <= set(heads)


def test_every_option_is_in_one_group():
    assert [each for each in parameters() if groups.group_of(each[1]) == groups.REST] == []
    names = [name for names in groups.GROUPS.values() for name in names]
    assert len(names) == len(set(names)) and set(names) <= {name for _, name in parameters()}


def test_missing_extras_are_named(monkeypatch):
    """Those of data and of tune's LoRA; the others have tests beside what they are for."""
    from anymla.data.text import read_documents
    from anymla.training.parameters import with_adapters

    for name in ("datasets", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TextError, match=r"pip install 'anymla\[data\]'$"):
        read_documents("org/stories")
    with pytest.raises(RecipeError, match=r"pip install 'anymla\[tune\]'$"):
        with_adapters(None, anymla.Tune())


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed")
def test_the_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("anymla-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < MOST_BYTES
    assert {"anymla/py.typed", "anymla/assets/stories260K/model.safetensors", "anymla/__main__.py"} <= set(names)
    assert all(name.startswith(("anymla/", "anymla-")) for name in names)

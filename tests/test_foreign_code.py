"""No code and no pickle of a checkpoint is ever run: each would leave a folder behind, whatever the user answers."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.damage import CONVERT, EVAL, GENERATE, INSPECT, PLAN, VALID, Case, config, copy_model, run_main
from tests.damage import Trap as Pickled

COMMANDS = {
    "inspect": INSPECT,
    "plan": PLAN,
    "convert": CONVERT,
    "eval": f"{EVAL} {{valid}}",
    "generate": f"{GENERATE} A",
}
EVIL = """
import pathlib
pathlib.Path({marker!r}).mkdir(exist_ok=True)
class Evil: pass
EvilConfig = EvilModel = generate = Evil
"""
AUTO = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoModel": "evil.EvilModel"}
SLOW_AND_FAST = ["evil.Evil", "evil.Evil"]


def set_trap(folder: Path, marker: Path) -> None:
    """Code under every name that transformers knows, and pickles."""
    code = EVIL.format(marker=str(marker))
    (folder / "custom_generate").mkdir()
    for name in (
        "evil.py",
        "custom_generate/generate.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "__init__.py",
    ):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.model", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Pickled(marker)))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": SLOW_AND_FAST}}))


@pytest.mark.parametrize("command", COMMANDS)
def test_code_beside_a_known_family_is_not_run(command, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = Case("trap", COMMANDS[command], (), config(auto_map=AUTO)).prepare(tmp_path)
    set_trap(tmp_path / "model", tmp_path / "ran")
    run = run_main(arguments, monkeypatch, capfd)
    assert run.code == 0, run
    assert not (tmp_path / "ran").exists()
    if command == "convert":
        assert not list((tmp_path / "out").glob("*evil*")) + list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_an_unknown_family_is_neither_run_nor_asked_about(command, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "ran").mkdir() or "y")
    arguments = Case("trap", COMMANDS[command], (), config(auto_map=AUTO, model_type="evil")).prepare(tmp_path)
    set_trap(tmp_path / "model", tmp_path / "ran")
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, len(run.err.splitlines())) == ((0, 0) if command == "inspect" else (1, 1)), run
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_the_code_in_a_converted_folder_is_not_run_where_anymla_is_installed(
    command, converted_folder, monkeypatch, capfd, tmp_path
):
    monkeypatch.chdir(tmp_path)
    copy_model(tmp_path / "model", converted_folder)
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text(EVIL.format(marker=str(tmp_path / "ran")))
    arguments = [part.format(model=tmp_path / "model", valid=VALID) for part in COMMANDS[command].split()]
    assert run_main(arguments, monkeypatch, capfd).code == 0
    assert not (tmp_path / "ran").exists()


def test_a_user_who_says_yes_to_everything_runs_nothing(tmp_path):
    arguments = Case("trap", CONVERT, (), config(auto_map=AUTO, model_type="evil")).prepare(tmp_path)
    set_trap(tmp_path / "model", tmp_path / "ran")
    done = subprocess.run(
        [Path(sys.executable).parent / "anymla", "generate", arguments[1], "--prompt", "A"],
        cwd=tmp_path,
        input=100 * "y\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_links_of_a_hub_cache_are_followed(monkeypatch, capfd, tmp_path):
    """In the hub's cache every file of a snapshot is a link to ../../blobs."""
    arguments = Case("links", CONVERT, ()).prepare(tmp_path)
    (tmp_path / "blobs").mkdir()
    for file in list((tmp_path / "model").iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    assert run_main(arguments, monkeypatch, capfd).code == 0
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["[/bold]", ":smile:", "\udcff", "a b", "\x1b[2J", "-model"], ids=ascii)
def test_a_folder_may_have_any_name(name, monkeypatch, capfd, tmp_path):
    copy_model(tmp_path / name)
    for command in ("inspect", "plan"):
        run = run_main([command, str(tmp_path / name)], monkeypatch, capfd)
        assert (run.code, run.err) == (0, "")
    run = run_main(["convert", str(tmp_path / name), "-o", str(tmp_path / name)], monkeypatch, capfd)
    assert (run.code, len(run.err.splitlines())) == (1, 1)
    assert run.err.rstrip("\n").isprintable()


def test_messages_hold_no_control_characters(monkeypatch, capfd, tmp_path):
    run = run_main(["inspect", str(tmp_path / "\x1b[2J\r\x07")], monkeypatch, capfd)
    assert run.code == 1
    assert run.err.rstrip("\n").isprintable()

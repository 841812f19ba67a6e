"""Bad input: exit code 1, one line that names the thing and the place, nothing written, the source untouched."""

import ast
import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers
from packaging.version import Version

from anymla.sweep import shards as writing
from tests.bad_config_cases import REFUSED_CONFIGS
from tests.bad_input_cases import CASES, IMPOSSIBLE_BUDGETS
from tests.damage import BUNDLED, CONVERT, FAST, GENERATE, PLAN, ROW, Case, Run, run_main

ANYMLA = Path(sys.executable).parent / "anymla"
AS_SUBPROCESS = ("weights-cut-in-half", "tensor-shape", "eval-rope-unknown")
GOOD = Case("good", CONVERT, ())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is out of reach, in this process and in those that it starts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def anymla(monkeypatch, capfd, tmp_path):
    """Runs a command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda arguments: run_main(arguments, monkeypatch, capfd)


def tree(folder):
    """Everything below a folder: the bytes of files, where links lead, folders as None."""
    return {
        path.relative_to(folder): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def console(arguments, cwd, **options):
    done = subprocess.run([ANYMLA, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, **options)
    return Run.of(done.returncode, done.stdout, done.stderr)


def message_of(run):
    """The one line on stderr, once it is known to be one."""
    assert run.code == 1, run
    assert run.out == ""
    lines = run.err.splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) > len("error: ")
    return lines[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_line_and_nothing_written(case, anymla, tmp_path):
    if case.id == "generation-max_time" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("older transformers look at max_time when the prompt has been printed")
    arguments = case.prepare(tmp_path)
    before = tree(tmp_path)
    message = message_of(anymla(arguments))
    assert case.missing_words(tmp_path, message) == [], message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", [case for case in CASES if case.id in AS_SUBPROCESS], ids=lambda case: case.id)
def test_one_line_from_the_console_script(case, tmp_path):
    arguments = case.prepare(tmp_path)
    before = tree(tmp_path)
    message = message_of(console(arguments, tmp_path))
    assert case.missing_words(tmp_path, message) == [], message
    assert tree(tmp_path) == before


def test_the_cases_are_distinct():
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.id for case in CASES} >= set(AS_SUBPROCESS)


@pytest.mark.parametrize("case", REFUSED_CONFIGS, ids=lambda case: case.id)
def test_inspect_tells_why_a_model_is_refused(case, anymla, tmp_path):
    case.prepare(tmp_path)
    run = anymla(["inspect", str(tmp_path / "model"), "--json"])
    facts = json.loads(run.out)
    assert (run.code, run.err, facts["supported"]) == (0, "", False)
    assert facts["cache_bytes_per_token"] is None
    assert case.missing_words(tmp_path, facts["reason"]) == [], facts["reason"]


@pytest.mark.parametrize("options", IMPOSSIBLE_BUDGETS)
def test_the_smallest_budget_named_is_possible_and_the_smallest(options, anymla, tmp_path):
    case = Case("budget", f"{PLAN} {options}", ("smallest possible",))
    arguments = case.prepare(tmp_path)
    message = message_of(anymla(arguments))
    assert case.missing_words(tmp_path, message) == [], message
    smallest = float(re.search(r"smallest possible is --kv-cache ([0-9.]+)$", message)[1])
    assert anymla([*arguments, "--kv-cache", str(smallest)]).code == 0
    one_number_less = smallest - 1 / 64
    assert anymla([*arguments, "--kv-cache", str(one_number_less)]).code == 1


def test_pickled_weights_are_never_opened(tmp_path):
    case = next(case for case in CASES if case.id == "weights-pickled")
    arguments = case.prepare(tmp_path)
    watched = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
        "from anymla import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    print([name for name in seen if name.endswith(('.bin', 'config.json'))])"
    )
    done = subprocess.run([sys.executable, "-c", watched, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert set(ast.literal_eval(done.stdout)) == {str(tmp_path / "model" / "config.json")}


def test_pickles_and_code_beside_the_weights_are_left_behind(anymla, tmp_path):
    arguments = GOOD.prepare(tmp_path)
    for name in ("pytorch_model.bin", "optimizer.pt", "modeling_evil.py"):
        (tmp_path / "model" / name).write_bytes(b"\xff not to be opened")
    before = tree(tmp_path / "model")
    assert anymla(arguments).code == 0
    assert tree(tmp_path / "model") == before
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".html",
        ".json",
        ".md",
        ".safetensors",
        ".py",
        ".yaml",
    }
    assert not (tmp_path / "out" / "modeling_evil.py").exists()


def test_overwrite_replaces_the_folder(anymla, tmp_path):
    arguments = GOOD.prepare(tmp_path)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "old.txt").write_text("old")
    refused = message_of(anymla([*arguments, "--overwrite"]))
    assert "holds no checkpoint" in refused  # a slip of the hand must not delete somebody's folder
    (tmp_path / "out" / "config.json").write_text("{}")
    assert anymla([*arguments, "--overwrite"]).code == 0
    assert not (tmp_path / "out" / "deep").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_an_output_folder_nobody_may_write_to(anymla, tmp_path):
    arguments = GOOD.prepare(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user, probably root, may write anywhere")
    assert str(locked) in message_of(anymla([*arguments, "-o", str(locked / "out")]))


def disk_fills_up(path, tensors):
    """Writes the first part of the weights and then fails as a full disk does."""
    path.write_bytes(100_000 * b"\0")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def user_interrupts(path, tensors):
    path.write_bytes(100_000 * b"\0")
    raise KeyboardInterrupt


def disk_is_full(_):
    return namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("place", "name", "failing", "words"),
    [
        (writing, "write_tensors", disk_fills_up, "No space left on device"),
        (sys.modules["shutil"], "disk_usage", disk_is_full, "MiB"),
    ],
    ids=["while-writing", "before-writing"],
)
def test_disk_full(old, place, name, failing, words, anymla, tmp_path, monkeypatch):
    arguments = GOOD.prepare(tmp_path)
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
    before = tree(tmp_path)
    monkeypatch.setattr(place, name, failing)
    message = message_of(anymla([*arguments, *(["--overwrite"] if old else [])]))
    assert str(tmp_path / "out") in message
    assert words in message
    assert tree(tmp_path) == before


def test_overwrite_of_a_link_replaces_the_link(anymla, tmp_path):
    arguments = GOOD.prepare(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine.txt").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert anymla([*arguments, "--overwrite"]).code == 0
    assert (tmp_path / "real" / "mine.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "real"}


def test_disk_full_below_a_new_folder(anymla, tmp_path, monkeypatch):
    arguments = GOOD.prepare(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(writing, "write_tensors", disk_fills_up)
    message_of(anymla([*arguments, "-o", str(tmp_path / "new" / "deep" / "out")]))
    assert tree(tmp_path) == before


def test_interrupted_while_writing(anymla, tmp_path, monkeypatch):
    arguments = GOOD.prepare(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(writing, "write_tensors", user_interrupts)
    run = anymla(arguments)
    assert (run.code, run.err.strip()) == (130, "stopped; nothing is left")
    assert tree(tmp_path) == before


def test_a_file_size_limit_stops_the_writing(tmp_path):
    arguments = GOOD.prepare(tmp_path)
    before = tree(tmp_path)
    limit = 300_000  # bytes: less than the weights, more than any other file
    run = console(arguments, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert str(tmp_path / "out") in message_of(run)
    assert tree(tmp_path) == before


def test_line_separators_inside_a_row_are_text(anymla, tmp_path):
    Case("", "", ()).prepare(tmp_path)
    story = ROW.replace("cat.", "cat.\u2028 It was fat.\x85")
    (tmp_path / "text.jsonl").write_text(200 * story, encoding="utf-8")
    run = anymla(
        [
            "convert",
            str(tmp_path / "model"),
            "-o",
            str(tmp_path / "out"),
            *FAST.split(),
            "--calibration",
            str(tmp_path / "text.jsonl"),
        ]
    )
    assert run.code == 0, run.err


def test_an_empty_prompt_starts_from_the_first_token(anymla):
    arguments = [part.replace("{model}", str(BUNDLED)) for part in GENERATE.split()]
    run = anymla([*arguments, ""])
    assert run.code == 0, run.err
    assert run.out.strip()


def test_a_good_conversion_leaves_the_source_untouched(anymla, tmp_path):
    arguments = GOOD.prepare(tmp_path)
    before = tree(tmp_path / "model")
    assert anymla(arguments).code == 0
    assert tree(tmp_path / "model") == before == tree(BUNDLED)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_the_note_on_bundled_text_does_not_hide_an_error(anymla, tmp_path):
    arguments = Case("", f"convert {{tmp}}/nowhere -o {{out}} {FAST}", ()).prepare(tmp_path)
    assert "nowhere" in message_of(anymla(arguments))

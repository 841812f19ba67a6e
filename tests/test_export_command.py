"""anymla export as a command: what it says, the commands it gives, what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex

import pytest
import torch

import anymla
from anymla.io.locks import lock_folder
from tests.damage import run_main


def test_command_line(stories, tmp_path, monkeypatch, capfd):
    arguments = ["export", str(stories.converted), "--to", "deepseek", "-o", str(tmp_path / "out")]
    done = run_main(arguments, monkeypatch, capfd)
    assert (done.code, done.err) == (0, "")
    assert "96 of 96 greedy tokens equal" in done.out
    served = f"python -m vllm.entrypoints.openai.api_server --model {tmp_path / 'out'} --dtype float32\n"
    assert f"vLLM (GPU):   {served}" in done.out
    assert "sglang" not in done.out
    done = run_main([*arguments, "--overwrite", "--json"], monkeypatch, capfd)
    report = json.loads(done.out)
    assert (report["target"], report["parity"]["tokens"]) == ("deepseek", 96)
    done = run_main(arguments, monkeypatch, capfd)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("to", "options", "cuda", "engine", "ends"),
    [
        ("deepseek", {}, False, "vLLM (GPU)", "--dtype float32"),
        ("deepseek", {"pad": "cuda", "dtype": "bfloat16"}, True, "vLLM (GPU)", "--dtype bfloat16"),
        (
            "deepseek",
            {"pad": "cpu"},
            False,
            "vLLM (CPU)",
            """--attention-backend CPU_MLA --compilation-config '{"custom_ops": ["-rotary_embedding"]}'""",
        ),
        ("deepseek", {"pad": "full"}, True, "vLLM", "--dtype float32"),
        ("vllm", {}, False, "vLLM (CPU)", "--trust-remote-code --dtype float32 --attention-backend CPU_MLA"),
        ("vllm", {"pad": "none"}, False, "vLLM (GPU)", "--trust-remote-code --dtype float32"),
    ],
)
def test_commands_serve_what_was_written(stories, tmp_path, monkeypatch, to, options, cuda, engine, ends):
    """By a shell, from a folder whose name a shell would take apart."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    done = anymla.export(stories.converted, tmp_path / "my $export's", to, **options)
    assert [name for name in done.commands if name.startswith("vLLM")] == [engine]
    assert done.commands[engine].endswith(ends)
    assert ("SGLang" in done.commands) == (options.get("pad") == "full")
    assert all(str(tmp_path / "my $export's") in shlex.split(command) for command in done.commands.values())
    card = (tmp_path / "my $export's" / "README.md").read_text()
    assert f"api_server --model THIS_FOLDER{' --trust-remote-code' if to == 'vllm' else ''} --dtype" in card


def test_says_where_the_cache_is_no_smaller(stories, tmp_path, monkeypatch, capfd):
    arguments = ["export", str(stories.converted), "--to", "vllm", "-o", str(tmp_path / "out"), "--json"]
    done = run_main(arguments, monkeypatch, capfd)
    report = json.loads(done.out)
    assert (report["cached_numbers"], report["original_numbers"], report["pad"]) == (576, 64, "cpu")
    assert done.err.startswith("warning: the export caches 576 numbers per token and layer, the original 64")
    assert "--pad none" in done.err
    done = run_main([*arguments, "--pad", "none", "--overwrite"], monkeypatch, capfd)
    assert (json.loads(done.out)["cached_numbers"], done.err) == (64 * stories.share, "")


def test_clears_what_killed_runs_left(stories, tmp_path):
    """Not what a run that is still at work holds, nor what belongs to another output."""
    left = [tmp_path / f".{name}-123456789/deepseek" for name in ("out.partial", "other.partial")]
    for folder in (*left, held := tmp_path / ".out.partial-1"):
        folder.mkdir(parents=True)
    handle = lock_folder(held)
    anymla.export(stories.converted, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", left[1].parent.name, held.name}
    os.close(handle)
    anymla.export(stories.converted, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", left[1].parent.name}

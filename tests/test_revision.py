"""Models of the hub at a revision, org/name@revision or --revision: from the hub's cache and from a fake of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

import anymla
from anymla.cards import command, public_name
from anymla.errors import CheckpointError, RecipeError
from anymla.evaluation.generation import stream_continuation
from anymla.io.find import CONFIG_FILES, find_model
from anymla.io.hub_cache import commit_of, repo_of
from tests.damage import BUNDLED, VALID, run_main
from tests.families import FAST, make_model, save_model
from tests.test_checkpoints_on_disk import sharded

OLD, NEW = 40 * "a", "0123456789abcdef0123456789abcdef01234567"
OPTIONS = "--kv-cache 0.5 --calibration-tokens 1024 --calibration-length 64 --reconstruction-steps 2"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with two commits of org/name: main has 2 layers, v1.0 and a pull request have 1."""
    folder = tmp_path / "cache" / "models--org--name"
    for commit, layers in ((NEW, 2), (OLD, 1)):
        model = make_model("llama", torch.float32, num_hidden_layers=layers)
        save_model(model, folder / "snapshots" / commit)
        for file in sorted((folder / "snapshots" / commit).iterdir()):  # as the hub client keeps them
            blob = folder / "blobs" / f"{commit}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            file.symlink_to(Path("../..") / "blobs" / blob.name)
    for name, commit in (("main", NEW), ("v1.0", OLD), ("refs/pr/3", OLD)):
        (folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("name", "commit"),
    [
        ("org/name", NEW),
        ("org/name@main", NEW),
        ("org/name@v1.0", OLD),
        ("org/name@refs/pr/3", OLD),
        (f"org/name@{OLD}", OLD),
    ],
)
def test_the_folder_of_a_revision(cache, name, commit):
    folder = find_model(name)
    assert folder == cache / "snapshots" / commit
    assert (commit_of(folder), repo_of(folder)) == (commit, "org/name")


@pytest.mark.parametrize(
    "name", ["org/name@v2", "org/name@", "@v1.0", "org/other@v1.0", "a/b/c@v1.0", "./org/name@v1.0"]
)
def test_no_such_revision(cache, name):
    with pytest.raises(CheckpointError, match=name.partition("@")[0]):
        find_model(name)


def test_a_path_with_an_at_that_exists_is_a_path(cache, tmp_path):
    for name in ("org/name@v1.0", "mine@home"):
        shutil.copytree(BUNDLED, tmp_path / name)
        assert find_model(name) == Path(name)
        assert len(anymla.inspect(name).model_spec.layers) == 5
        assert anymla.inspect(name).commit is None


def test_revisions_of_local_folders_are_refused(cache, tmp_path, monkeypatch, capfd):
    shutil.copytree(BUNDLED, tmp_path / "here/model")
    for arguments in (
        "inspect {} --revision main",
        "plan {} --revision main",
        f"convert {{}} -o out --revision main {OPTIONS}",
        f"eval {{}} --text {VALID} --revision main",
        "generate {} --prompt Once --revision main",
        f"tune {{}} --teacher {{}} --data {VALID} -o out --revision main",
        "inspect {}@main",
    ):
        run = run_main(arguments.format("here/model", "here/model").split(), monkeypatch, capfd)
        assert (run.code, run.out) == (1, ""), arguments
        assert run.err.count("\n") == 1
        assert "here/model is a local folder, and only models on the hub have revisions" in run.err


def test_one_revision_at_a_time(cache):
    for revision in ("v1.0", ""):
        with pytest.raises(RecipeError, match="give one revision"):
            anymla.inspect("org/name@main", revision=revision)


@pytest.mark.parametrize("way", ["in the name", "as an option"])
def test_inspect_plan_and_convert(cache, way, monkeypatch, capfd):
    model = ["org/name@v1.0"] if way == "in the name" else ["org/name", "--revision", "v1.0"]
    run = run_main(["inspect", *model, "--json"], monkeypatch, capfd)
    facts = json.loads(run.out)
    assert (facts["model"], facts["commit"], facts["num_layers"]) == ("org/name@v1.0", OLD, 1)
    run = run_main(["plan", *model, "-o", "plan.yaml", *OPTIONS.split()], monkeypatch, capfd)
    assert "anymla convert org/name@v1.0 -o OUT" in run.out
    run = run_main(["convert", *model, "-o", "out", *OPTIONS.split()], monkeypatch, capfd)
    assert run.code == 0, run.err
    assert "anymla compare org/name@v1.0 out --text" in run.out
    report, card = json.loads(Path("out/conversion.json").read_text()), Path("out/README.md").read_text()
    assert (report["model"], report["commit"], len(report["layers"])) == ("org/name@v1.0", OLD, 1)
    assert "\nbase_model: org/name\n" in card
    assert "# org/name@v1.0 with multi-head latent attention" in card
    assert "anymla convert org/name@v1.0 -o OUT" in card
    assert f"commit `{OLD}` of org/name" in card
    assert run_main(["convert", *model, "-o", "again", "--plan", "plan.yaml"], monkeypatch, capfd).code == 0


def test_eval_generate_and_tune(cache, tmp_path, monkeypatch, capfd):
    anymla.convert("org/name", "out", revision="v1.0", kv_cache=0.5, **FAST)
    arguments = ["eval", "out", "--against", "org/name@v1.0", "--text", str(VALID), "--tokens", "512", "--length", "64"]
    compared = run_main([*arguments, "--json"], monkeypatch, capfd)
    assert json.loads(compared.out)["kl"] < 5
    command_line = ["eval", "org/name", "--revision", "v1.0", *arguments[2:], "-o", "results", "--json"]
    assert json.loads(run_main(command_line, monkeypatch, capfd).out)["kl"] == pytest.approx(0, abs=1e-6)
    settings = json.loads(Path("results/results.json").read_text())["settings"]
    assert (settings["model"], settings["commit"], settings["against_commit"]) == ("org/name@v1.0", OLD, OLD)
    options = {"max_new_tokens": 2, "temperature": 0, "seed": 0, "device": "cpu", "dtype": None}
    options |= {"adapter": None, "note": print}
    counted = []
    monkeypatch.setattr(
        "anymla.evaluation.generation.continuation", lambda model, *_, **__: counted.append(len(model.model.layers))
    )
    for revision in ("v1.0", "main"):
        stream_continuation("org/name", "Once", revision=revision, **options)
    assert counted == [1, 2]
    config = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):  # of v1.0, which has one less
        anymla.tune("out", tmp_path / "tuned", teacher="org/name@v1.0", data=str(VALID))
    with pytest.raises(CheckpointError, match=f"snapshots/{OLD} was not converted by anymla"):
        anymla.tune("org/name", tmp_path / "tuned", teacher="org/name@v1.0", revision="v1.0", data=str(VALID))


def test_what_the_hub_is_asked_for(tmp_path, monkeypatch):
    """Shards in a subfolder, or under other names, are asked for once the index has come."""
    asked, remote = [], sharded(save_model(make_model("llama"), tmp_path / "remote"), ["weights/a.safetensors"])

    def download(repo, *, revision, allow_patterns, local_files_only, **_):
        asked.append((repo, revision, allow_patterns))
        (tmp_path / "local" / "weights").mkdir(parents=True, exist_ok=True)
        for file in remote.rglob("*"):
            name = file.relative_to(remote).as_posix()
            if any(Path(name).match(pattern) for pattern in allow_patterns if "/" not in name or "/" in pattern):
                shutil.copyfile(file, tmp_path / "local" / name)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = find_model("org/name@v1.0")
    assert [(repo, revision) for repo, revision, _ in asked] == 2 * [("org/name", "v1.0")]
    assert asked[1][2] == ["weights/a.safetensors"]
    assert (folder / "weights" / "a.safetensors").is_file()
    find_model("org/name", config_only=True)
    assert asked[2] == ("org/name", None, CONFIG_FILES)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_snapshot_of_which_a_part_is_missing(cache, name):
    """A download that was stopped, or `anymla inspect` while the hub was there: its config alone."""
    (cache / "snapshots" / NEW / name).unlink()
    with pytest.raises(CheckpointError) as error:
        anymla.convert("org/name", "out", **FAST)
    if name != "tokenizer.json":
        assert f"holds only part of org/name: run `hf download org/name --revision {NEW}`" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_snapshot_that_has_lost_a_blob(cache, name):
    (cache / "blobs" / f"{NEW}-{name}").unlink()
    with pytest.raises(
        CheckpointError, match=r"a link to \.\./\.\./blobs/.*which is not there.*run `hf download org/name"
    ):
        anymla.convert("org/name", "out", **FAST)


def test_names_in_a_card():
    assert public_name("org/name@refs/pr/3") == "org/name@refs/pr/3"
    assert public_name("/home/me/models/name@home") == "name@home"
    assert command("org/name@v1.0", {"kv_cache": 0.5}) == "anymla convert org/name@v1.0 -o OUT --kv-cache 0.5"

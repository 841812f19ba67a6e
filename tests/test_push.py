"""anymla push, with a hub that only listens."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

import anymla
from anymla.cards import command, with_section
from anymla.cli import main
from anymla.errors import CheckpointError, OutputError, RecipeError
from anymla.methods.mla.settings import MLA


@pytest.fixture
def folder(converted_folder, tmp_path):
    shutil.copytree(converted_folder, tmp_path / "model")
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "note").write_text("not for the hub")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the hub."""
    calls = []

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, repo, **options):
            calls.append(("create_repo", repo, options))
            return f"https://huggingface.co/{repo}"

        def create_commit(self, repo, operations, **options):
            calls.append(("create_commit", repo, {each.path_in_repo: each.path_or_fileobj for each in operations}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    return calls


def test_push_uploads_the_folder_with_a_complete_card(folder, hub):
    done = anymla.push(folder, "somebody/small", private=True)
    assert done.url == "https://huggingface.co/somebody/small"
    (made, repo, options), (sent, place, sources) = hub
    assert (made, repo, sent, place) == ("create_repo", "somebody/small", "create_commit", "somebody/small")
    assert options == {"private": True, "exist_ok": True}
    assert sources.keys() == done.files.keys()
    assert all(Path(source) == folder / name for name, source in sources.items() if name != "README.md")
    assert not any(name.startswith(".") for name in done.files)
    assert all(size == (folder / name).stat().st_size for name, size in done.files.items() if name != "README.md")
    assert {"README.md", "model.safetensors", "conversion.json"} <= done.files.keys()
    card = sources["README.md"].decode()
    assert len(sources["README.md"]) == done.files["README.md"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert 'from_pretrained("somebody/small")' in card
    assert "THIS_FOLDER" not in card


def test_the_card_says_how_the_model_was_made(folder):
    report, card = json.loads((folder / "conversion.json").read_text()), (folder / "README.md").read_text()
    assert f"{report['before']['perplexity']:.4g}" in card and f"{report['after']['perplexity']:.4g}" in card
    assert "--kv-cache 0.25 --reconstruction-steps 10 --calibration-tokens 8192 --calibration-length 128" in card
    assert "https://arxiv.org/abs/2405.04434" in card
    assert f"torch {report['versions']['torch']}" in card
    assert "trust_remote_code=True" in card and "anymla export" in card and "## Limits" in card


def test_pushing_twice_gives_the_same_card(folder):
    anymla.push(folder, "somebody/small", dry_run=True)
    first = (folder / "README.md").read_text()
    anymla.push(folder, "somebody/small", dry_run=True)
    assert (folder / "README.md").read_text() == first
    assert first.count("## Files") == 1


def test_every_repository_gets_its_own_name(folder, hub):
    anymla.push(folder, "user/first", dry_run=True)
    for repo in ("user/second", "user/third"):
        hub.clear()
        anymla.push(folder, repo)
        card = hub[1][2]["README.md"].decode()
        assert f'from_pretrained("{repo}")' in card
        assert "THIS_FOLDER" not in card and card.count("user/") == card.count(repo)


def test_a_card_that_is_no_text(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"README.md is not in UTF-8"):
        anymla.push(folder, "somebody/small", dry_run=True)
    assert (folder / "README.md").read_bytes() == b"\xff\xfe"


def test_offline_nothing_is_uploaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anymla", "push", str(folder), "somebody/small"])
    with pytest.raises(SystemExit) as stopped:  # HF_HUB_OFFLINE=1 in all tests
        main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "Nothing was uploaded" in said
    assert "## Files" in (folder / "README.md").read_text()


def test_a_dry_run_uploads_nothing(folder, hub):
    assert anymla.push(folder, "somebody/small", dry_run=True).url is None
    assert hub == []


def test_a_hub_that_refuses(folder, hub, monkeypatch):
    def refuse(self, repo, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(OutputError, match=r"no route.*hf auth login"):
        anymla.push(folder, "somebody/small")


@pytest.mark.parametrize("repo", ["small", "a/b/c", "some body/small", ""])
def test_names_that_are_no_repositories(folder, repo):
    before = (folder / "README.md").read_text()
    with pytest.raises(RecipeError, match="user/name"):
        anymla.push(folder, repo)
    assert (folder / "README.md").read_text() == before


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="not written by anymla"):
        anymla.push(tmp_path, "somebody/small")
    assert not list(tmp_path.iterdir())


def test_the_command_spells_out_what_was_set():
    recipe = MLA(kv_cache=0.5, rope="elite", rope_dims=4, expected_rotation=False, calibration="my text.txt")
    assert command("org/model", recipe.model_dump()) == (
        "anymla convert org/model -o OUT --kv-cache 0.5 --rope elite --rope-dims 4 --no-expected-rotation "
        "--calibration 'my text.txt'"
    )


def test_sections_are_replaced_or_added():
    card = "# Title\n\n## One\n\nold\n\n## Two\n\nstays\n"
    assert with_section(card, "One", "new") == "# Title\n\n## One\n\nnew\n\n## Two\n\nstays\n"
    assert with_section(card, "Three", "more").endswith("stays\n\n## Three\n\nmore\n")

"""What the house promises of itself: the mathematics in one sitting, and a choice in one file."""

from pathlib import Path

import pytest

import anymla.methods.mla
from anymla.methods.base import classes_in
from anymla.methods.mla.factorization import FACTORIZATIONS, Factorization
from anymla.methods.mla.rope import ROPE_CHOICES, RopeChoice

FOLDER = Path(anymla.methods.mla.__file__).parent
DEFAULT_PATH = (
    "moments.py",
    "channels.py",
    "rope/channel_pca.py",
    "latent.py",
    "factorization/output_aware.py",
    "weights.py",
    "refit.py",
    "reconstruct.py",
)


def test_the_default_path_is_read_in_one_sitting():
    assert sum(len((FOLDER / name).read_text(encoding="utf-8").splitlines()) for name in DEFAULT_PATH) < 1000


@pytest.mark.parametrize(("choices", "kind"), [(ROPE_CHOICES, RopeChoice), (FACTORIZATIONS, Factorization)])
def test_every_choice_says_what_it_is_and_whose(choices, kind):
    for name, choice in choices.items():
        assert isinstance(choice, kind) and choice.name == name
        assert choice.summary and choice.paper.title
    assert {name for name, choice in choices.items() if choice.paper.link is None} in (
        {"channel-pca"},
        {"output-aware"},
    )


def test_a_rope_choice_is_one_file(tmp_path, monkeypatch):
    text = (FOLDER / "rope" / "high.py").read_text(encoding="utf-8")
    (tmp_path / "higher.py").write_text(text.replace('"high"', '"higher"').replace("class High", "class Higher"))
    import anymla.methods.mla.rope as rope

    monkeypatch.setattr(rope, "__path__", [*rope.__path__, str(tmp_path)])
    found = classes_in([str(tmp_path)], rope.__name__, RopeChoice)
    assert found["higher"].paper.title == "MHA2MLA" and found.keys() - ROPE_CHOICES.keys() == {"higher"}


@pytest.mark.parametrize(
    ("settings", "credited"),
    [
        ({}, []),
        ({"rope": "elite"}, ["EliteKV"]),
        ({"rope": "freqfold-4", "factorization": "whitened"}, ["TransMLA", "SVD-LLM"]),
    ],
)
def test_cards_credit_the_papers_of_the_choices(settings, credited):
    papers = [paper.title for paper in anymla.MLA(**settings).papers() if paper.link]
    assert papers == credited

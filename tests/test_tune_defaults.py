"""What `tune` finds by itself: the learning rate, how long to learn, and which weights were best."""

import json

import pytest
import torch
from safetensors.torch import load_file

import anymla
from anymla.data.mixture import Source, Texts, tokens_of_a_pass
from anymla.evaluation.logits import Logits
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.tune import Tune
from anymla.recipe import read_tune
from anymla.training.best import Best
from anymla.training.rates import best_power, first_power, next_power, rate_of, trial_of
from anymla.training.redraw import redrawn
from anymla.training.stages import Stage
from tests.damage import BUNDLED, TRAIN, VALID

SETTINGS = {"data": [str(TRAIN)], "eval_data": str(VALID), "eval_tokens": 256, "device": "cpu"}
SHORT = SETTINGS | {"length": 16, "batch": 1, "tokens": 256, "save_every": 4, "eval_every": 4}


@pytest.fixture(scope="module", autouse=True)
def few_rows_to_draw_from():
    """Each trial draws its rows anew, which takes longer than a trial of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymla.data.mixture.SHUFFLED_TOKENS", 2048)
        yield


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """A short run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    anymla.tune(pair[1], folder, teacher=pair[0], **SHORT)
    return folder


@pytest.mark.parametrize("lowest", [-4, 0, 2])
def test_the_rate_is_walked_to_its_best(lowest):
    scores = {0: abs(lowest)}
    while (power := next_power(scores)) is not None:
        assert power not in scores
        scores[power] = abs(power - lowest)
    assert best_power(scores) == lowest and len(scores) <= abs(lowest) + 3
    assert [first_power(kl) for kl in (2.0, 0.5, 0.06, 0.0065, 0.0)] == [0, -1, -4, -7, -10]
    assert rate_of(0, 64) == 0.00313 and rate_of(-1, 64) == pytest.approx(0.2 / 64 / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("steps", "tokens", "trial"),
    [(1171, 512, 117), (1953, 2048, 39), (10_000, 512, 200), (20, 64, 20)],
)
def test_a_trial_sees_enough(steps, tokens, trial):
    stage = Stage(name="logits", steps=steps, rows=1, length=tokens, micro=1, accumulation=1)
    assert trial_of(stage).steps == trial


def test_rates_have_an_end():
    scores = {0: 0}
    while (power := next_power(scores)) is not None:
        scores[power] = power  # the lower the better
    assert best_power(scores) == min(scores) and len(scores) == 11
    assert best_power({0: float("inf"), -1: 2.0}) == -1


def test_the_best_is_kept(tmp_path):
    best = Best(tmp_path / "best.safetensors", patience=2)
    for score in (3.0, 3.5):
        best.take(score, lambda: {})
    assert (best.place, best.weights(), best.ends) == (0, {}, False)
    for score in (2.0, 2.5, 2.1):
        best.take(score, lambda score=score: {"w": torch.tensor([score])})
    assert (best.place, best.ends) == (2, True)
    assert best.weights()["w"].tolist() == [2.0]


def test_tokens_of_a_mixture_until_one_begins_anew(tmp_path):
    for name, count in (("a", 10), ("b", 40)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} " * 20}) for _ in range(count)))
    tokenizer = load_tokenizer(BUNDLED)
    sources = [Source.of(f"{tmp_path}/a.jsonl@3"), Source.of(f"{tmp_path}/b.jsonl")]
    one = tokens_of_a_pass(Texts(sources[:1], torch.zeros(1, 1), [0]), tokenizer, 32, 10**6)
    both = tokens_of_a_pass(Texts(sources, torch.zeros(1, 1), [0, 0]), tokenizer, 32, 10**6)
    assert one > 200 and both == pytest.approx(one * 4 / 3, abs=1)
    assert tokens_of_a_pass(Texts([Source.of(str(tmp_path))], torch.zeros(1, 1), [0]), tokenizer, 32, 9) is None


def test_nothing_given_but_text(pair, tmp_path):
    """As many tokens as there are in 30 passes, or fewer; what was found is told, and gives the same again."""
    text, told = tmp_path / "little.txt", []
    text.write_text(TRAIN.read_text()[:1500])
    settings = SETTINGS | {"data": [str(text)], "length": 64, "batch": 16}
    report = anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], note=told.append, **settings)
    assert any("30 passes over the data" in text for text in told)
    assert report.tuning.early_stop == 3 and report.tuning.learning_rate and report.tuning.train == "all"
    assert report.tokens <= report.tuning.tokens and report.after.kl <= report.before.kl
    assert Tune.of(read_tune(tmp_path / "out" / "tuning.yaml")) == report.tuning


def test_the_original_draws_tokens_anew():
    """By its distribution; rows apart from each other; first tokens of documents stay."""
    ids = torch.arange(4000).reshape(2, 2000) % 5
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-9]).log().expand(2, 2000, 5)
    begins = torch.zeros(2, 2000, dtype=torch.bool)
    begins[:, 1000:] = True
    found = redrawn(Logits.of(logits), ids, begins, 1.0, 0)
    assert torch.equal(found[:, 1000:], ids[:, 1000:]) and torch.equal(found[:, 0], ids[:, 0])
    assert torch.equal(redrawn(Logits.of(logits[1:]), ids[1:], begins[1:], 1.0, 0)[0], found[1])
    assert not torch.equal(redrawn(Logits.of(logits), ids, begins, 1.0, 1), found)
    assert torch.equal(redrawn(Logits.of(logits), ids, begins, 0.0, 0), ids)
    many = [redrawn(Logits.of(logits), ids, begins, 1.0, seed)[:, :1000] for seed in range(20)]
    shares = torch.bincount(torch.cat([each[ids[:, :1000] == 4] for each in many]), minlength=5).double()
    assert torch.allclose(shares[:4] / shares[:4].sum(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), atol=0.03)
    assert 0.3 < shares[:4].sum() / shares.sum() < 0.7


@pytest.mark.parametrize("stop", ["trial", "step"])
def test_stopped_in_a_trial_or_after_it(pair, whole, tmp_path, stop):
    """The same trials, steps, losses and weights as without the stop."""
    seen = []

    def progress(now):
        seen.append(now.what)
        if (len(set(seen)) == 3 and stop == "trial") or (now.what == "step" and now.step == 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], progress=progress, **SHORT)
    assert ("8 of 16 steps are kept" if stop == "step" else "1 trials of the rate") in stopped.value.__notes__[0]
    first, again = list(dict.fromkeys(seen)), []
    anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], progress=lambda now: again.append(now.what), **SHORT)
    assert not set(first[:2]) & set(again)
    assert (again[0] == "step") == (stop == "step")
    for name in ("metrics.jsonl", "tuning.yaml"):
        assert (tmp_path / "out" / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", whole))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())

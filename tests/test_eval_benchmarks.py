"""`anymla eval` beyond perplexity: BLiMP, LAMBADA, the probe, what is written, and bad input."""

import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

import anymla
from anymla.evaluation.blimp import read_blimp
from anymla.evaluation.likelihood import Query, answers, untracked
from anymla.evaluation.measures import Comparison, Measure
from anymla.evaluation.probe import DEPTHS, TRIALS, probe_lengths, probe_questions
from anymla.io.checkpoint import load_model, load_tokenizer
from tests.damage import BUNDLED, TRAIN, VALID, run_main
from tests.pages import check_page

GOOD, BAD = "Once upon a time, there was a little girl named Lily.", "Time a upon girl Lily once was there little, a."
PASSAGES = ["Once upon a time", "Once upon a zebra", "there was a little girl named Lily"]  # the second is news


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    """The bundled model at full budget: converted, and the same."""
    folder = tmp_path_factory.mktemp("same") / "model"
    anymla.convert(
        BUNDLED, folder, kv_cache=1.0, codec="none", calibration=TRAIN, calibration_tokens=2048, calibration_length=64
    )
    return folder


@pytest.fixture
def blimp(tmp_path):
    """Two paradigms: one that any model of stories gets right, one that it gets wrong, and a tie."""
    folder = tmp_path / "blimp"
    folder.mkdir()
    pairs = {"order": 3 * [(GOOD, BAD)], "turned": [(BAD, GOOD), (GOOD, GOOD)]}
    for name, rows in pairs.items():
        lines = [{"sentence_good": good, "sentence_bad": bad, "field": f"of_{name}", "UID": name} for good, bad in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def lambada(tmp_path):
    path = tmp_path / "last.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return path


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_main([str(argument) for argument in arguments], monkeypatch, capfd)


def zipped(folder, path):
    """The folder as BLiMP is distributed: below data/, with what macOS adds."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"data/{file.name}")
            archive.writestr(f"__MACOSX/data/._{file.name}", b"\0\xff")
    return path


def values(rows):
    return {row.model.name: row.model.value for row in rows}


class Copier(torch.nn.Module):
    """Foresees what came last after the longest of its last tokens, four at most, that it has seen before."""

    def __init__(self, vocabulary):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
        self.device, self.vocabulary = torch.device("cpu"), vocabulary

    def forward(self, input_ids, use_cache):
        found = torch.zeros_like(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            after = {}
            for place in range(len(ids)):
                ends = [tuple(ids[max(0, place + 1 - many) : place + 1]) for many in (4, 3, 2, 1)]
                found[row, place] = next((after[end] for end in ends if end in after), 0)
                after |= dict.fromkeys(ends, ids[place + 1] if place + 1 < len(ids) else 0)
        return SimpleNamespace(logits=100.0 * one_hot(found, self.vocabulary))


def test_a_model_that_copies_perfectly_scores_1():
    tokenizer = load_tokenizer(BUNDLED)
    questions = probe_questions(tokenizer, 128)
    found = answers(Copier(512), questions.queries, context=128, batch_size=32, track=untracked, label="")
    measured = {(row.name, row.metric): row for row in questions.measures(found) if row.part_of is None}
    assert measured["copy", "accuracy"].value == 1
    assert measured["copy", "probability"].value == pytest.approx(1)
    assert measured["needle", "probability"].value == pytest.approx(1)
    assert measured["recall", "gain (nats per token)"].value > 10


def test_the_probe_is_of_the_lengths_and_depths_it_says():
    assert probe_lengths(512) == [64, 128, 256, 512]
    assert probe_lengths(100) == [100]
    tokenizer = load_tokenizer(BUNDLED)
    questions = probe_questions(tokenizer, 256)
    assert {len(query.ids) for query in questions.queries} == {64, 128, 256}
    assert len(questions.queries) == 4 * 3 * len(DEPTHS) * TRIALS
    row = questions.queries[0].ids  # depth 0: right behind the BOS token, and again at the end
    assert row[1:17] == row[-16:]
    adjacent = questions.queries[(len(DEPTHS) - 1) * TRIALS].ids
    assert adjacent[-32:-16] == adjacent[-16:]


def test_the_probe_at_full_budget_is_that_of_the_original(same):
    wanted = anymla.Benchmarks(probe=True)
    rows = anymla.evaluate(same, against=BUNDLED, benchmarks=wanted, length=128, dtype="float64").benchmarks["probe"]
    assert len(rows) == 5 * (1 + 2 * len(DEPTHS))
    for row in rows:
        assert row.model.value == pytest.approx(row.original.value, abs=1e-6)
        assert row.difference == pytest.approx(0, abs=1e-6)


def test_the_probe_sees_what_a_smaller_cache_loses(converted_folder):
    wanted = anymla.Benchmarks(probe=True)
    rows = anymla.evaluate(converted_folder, against=BUNDLED, benchmarks=wanted, length=128).benchmarks["probe"]
    recall = next(row for row in rows if row.model.name == "recall" and row.model.part_of is None)
    assert recall.original.value > 0.1
    assert recall.model.samples == TRIALS
    assert recall.ratio < 0.5
    assert recall.difference < -2 * recall.difference_stderr


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_blimp(packed, blimp, tmp_path):
    source = zipped(blimp, tmp_path / "blimp.zip") if packed else blimp
    evaluation = anymla.evaluate(BUNDLED, benchmarks=anymla.Benchmarks(blimp=source))
    rows = evaluation.benchmarks["blimp"]
    assert values(rows) == {
        "blimp": 3 / 5,
        "blimp of_order": 1,
        "blimp of_turned": 0,
        "order": 1,
        "turned": 0,
    }
    assert [row.model.samples for row in rows] == [5, 3, 2, 3, 2]
    assert rows[0].model.stderr == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert [row.model.part_of for row in rows[-2:]] == ["blimp of_order", "blimp of_turned"]
    assert evaluation.scores is None
    assert rows[0].original is rows[0].difference is rows[0].ratio is None


def test_limit_is_per_paradigm(blimp):
    assert [len(paradigm.pairs) for paradigm in read_blimp(blimp, 1)] == [1, 1]
    assert [len(paradigm.pairs) for paradigm in read_blimp(blimp, None)] == [3, 2]


def test_lambada(lambada, same):
    wanted = anymla.Benchmarks(lambada=lambada)
    accuracy, perplexity = anymla.evaluate(same, against=BUNDLED, benchmarks=wanted).benchmarks["lambada"]
    assert accuracy.model.value == accuracy.original.value == pytest.approx(2 / 3)
    assert (accuracy.difference, accuracy.difference_stderr) == (0, 0)
    model, tokenizer = load_model(BUNDLED), load_tokenizer(BUNDLED)
    losses = []
    for passage in PASSAGES:
        whole, given = (tokenizer(text)["input_ids"] for text in (passage, passage.rsplit(maxsplit=1)[0]))
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        losses.append(-sum(log_p[place - 1, whole[place]].item() for place in range(len(given), len(whole))))
    assert perplexity.model.value == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)
    assert perplexity.model.higher_is_better is False


def test_batches_and_padding_change_nothing(original):
    queries = [Query(list(range(5, 5 + length)), 2) for length in (3, 30, 7, 12)]
    run = {"context": None, "track": untracked, "label": ""}
    alone, together = (answers(original, queries, batch_size=size, **run) for size in (1, 4))
    for one, other in zip(alone, together):
        assert torch.allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert torch.equal(one.likeliest, other.likeliest)
    assert [len(answer.log_probs) for answer in alone] == [1, 28, 5, 10]


def test_what_is_further_back_than_the_context_is_left_out():
    assert Query([1, 2, 3, 4], 3).within(3) == Query([2, 3, 4], 2)
    assert Query([1, 2, 3, 4], 1).within(2) == Query([3, 4], 1)
    assert Query([1, 2], 1).within(None) == Query([1, 2], 1)


def test_the_difference_has_the_error_of_paired_items():
    old = Measure.mean("n", "m", [1.0, 0.0, 1.0, 0.0])
    new = Measure.mean("n", "m", [1.0, 0.0, 1.0, 1.0])
    pair = Comparison(model=new, original=old)
    assert (pair.difference, pair.ratio) == (0.25, 1.5)
    assert pair.difference_stderr == pytest.approx(0.25)
    assert pair.difference_stderr < new.stderr + old.stderr
    assert Comparison(model=new, original=Measure.mean("n", "m", [0.0])).difference_stderr is None


def test_results_are_written_whole(cli, same, blimp, lambada, tmp_path):
    arguments = ["eval", same, "--against", BUNDLED, "--blimp", blimp, "--lambada", lambada, "--limit", "2", "--probe"]
    arguments += ["--text", VALID, "--tokens", "512", "--length", "64", "-o", tmp_path / "results", "--json"]
    done = cli(*arguments)
    assert (done.code, done.err) == (0, "")
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert json.loads(done.out) == written
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"results.json", "report.html"}
    check_page(tmp_path / "results" / "report.html", written)
    assert written["tokens"] == 512 and written["kl"] < 1e-4
    original = written["original"]
    assert original["perplexity"] == pytest.approx(written["perplexity"], rel=1e-4)
    page = (tmp_path / "results" / "report.html").read_text()
    assert f"original: {original['perplexity']:.4g}" in page and "<td>original</td>" in page
    assert {"probe", "blimp", "lambada", "settings", "versions", "command", "perplexity"} <= set(written)
    assert "tasks" not in written
    for row in written["blimp"] + written["lambada"] + written["probe"]:
        assert {"name", "metric", "model", "original", "difference", "difference_stderr", "ratio", "samples"} <= set(
            row
        )
        assert set(row["model"]) == set(row["original"]) == {"value", "stderr"}
    settings = written["settings"]
    assert (settings["model"], settings["against"], settings["limit"]) == (str(same), str(BUNDLED), 2)
    assert (settings["dtype"], settings["length"]) == ("float32", 64)
    assert set(written["versions"]) == {"python", "anymla", "torch", "transformers"}
    assert written["command"].startswith("anymla eval ")
    again = ["eval", BUNDLED, "--blimp", blimp, "-o", tmp_path / "results"]
    assert cli(*again).code == 0  # an earlier evaluation is replaced
    assert "probe" not in json.loads((tmp_path / "results" / "results.json").read_text())
    (tmp_path / "results" / "mine.txt").write_text("mine")
    refused = cli(*again)
    assert refused.code == 1 and "-o" in refused.err
    assert (tmp_path / "results" / "mine.txt").read_text() == "mine"


def test_tables(cli, same, blimp, lambada, monkeypatch):
    monkeypatch.setattr(anymla.cli.out, "width", 200)
    done = cli("eval", same, "--against", BUNDLED, "--blimp", blimp, "--lambada", lambada, "--probe", "--length", "64")
    assert (done.code, done.err) == (0, "")
    for words in ("BLiMP", "blimp of_order", "turned", "LAMBADA", "perplexity", "difference", "needle", "depth 0.25"):
        assert words in done.out
    read = cli("eval", same, "--against", BUNDLED, "--text", VALID, "--tokens", "256", "--length", "64")
    assert read.out.count("1.2 KiB") == 2 and "original" in read.out
    alone = cli("eval", BUNDLED, "--blimp", blimp)
    assert "value" in alone.out and "difference" not in alone.out


def test_text_alone_is_written_as_it_was(cli, tmp_path):
    arguments = ["eval", BUNDLED, "--text", VALID, "--tokens", "512", "--length", "64", "--json"]
    alone, written = cli(*arguments), cli(*arguments, "-o", tmp_path / "results")
    assert json.loads(alone.out) == json.loads(written.out)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results.items() >= json.loads(alone.out).items()
    check_page(tmp_path / "results" / "report.html", results)


def bad_zip(tmp):
    (tmp / "in").write_bytes(b"PK\x03\x04 no zip")


def huge_member(tmp):
    with zipfile.ZipFile(tmp / "in", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/a.jsonl", b"\n" * (1 << 27))


def row(**fields):
    return lambda tmp: (tmp / "in.jsonl").write_text(json.dumps(fields) + "\n")


def paradigm(content):
    def make(tmp):
        (tmp / "in").mkdir()
        (tmp / "in" / "a.jsonl").write_bytes(content)

    return make


PAIR = b'{"sentence_good": "a b", "sentence_bad": "b a"}\n'
BAD_INPUT = {
    "nothing": ("", None, ("--text", "--tasks", "--probe", "--blimp", "--lambada")),
    "tasks-nameless": ("--tasks ,", None, ("--tasks",)),
    "blimp-missing": ("--blimp {tmp}/nowhere", None, ("--blimp", "nowhere")),
    "blimp-no-zip": ("--blimp {tmp}/in", bad_zip, ("--blimp", "/in", ".zip")),
    "blimp-empty": ("--blimp {tmp}", None, ("--blimp", "no .jsonl")),
    "blimp-huge": ("--blimp {tmp}/in", huge_member, ("a.jsonl", "64 MiB")),
    "blimp-field-missing": ("--blimp {tmp}/in", paradigm(2 * PAIR + b"{}\n"), ("a.jsonl", "line 3", "sentence_good")),
    "blimp-no-json": ("--blimp {tmp}/in", paradigm(PAIR + b"[\n"), ("a.jsonl", "line 2", "JSON")),
    "blimp-not-utf8": ("--blimp {tmp}/in", paradigm(PAIR + b"\xff\n"), ("a.jsonl", "UTF-8")),
    "blimp-surrogate": ("--blimp {tmp}/in", paradigm(PAIR.replace(b"a b", rb"\ud800")), ("a.jsonl", "line 1")),
    "blimp-no-pairs": ("--blimp {tmp}/in", paradigm(b"\n"), ("a.jsonl", "no pairs")),
    "lambada-missing": ("--lambada {tmp}/in.jsonl", None, ("--lambada", "in.jsonl")),
    "lambada-no-jsonl": ("--lambada {valid}", None, ("--lambada", ".jsonl")),
    "lambada-one-word": ("--lambada {tmp}/in.jsonl", row(text="Once"), ("--lambada", "'Once'")),
    "lambada-no-text": ("--lambada {tmp}/in.jsonl", row(story="Once"), ("in.jsonl", "line 1", "'text'")),
    "probe-short": ("--probe --length 32", None, ("--probe", "64", "--length")),
    "limit-0": ("--probe --limit 0", None, ("--limit",)),
    "batch-size-0": ("--probe --batch-size 0", None, ("--batch-size",)),
    "out-is-a-file": ("--probe -o {tmp}/in.jsonl", row(), ("in.jsonl", "file", "-o")),
    "out-holds-more": ("--probe -o {tmp}/in", paradigm(PAIR), ("/in", "-o")),
    "against-missing": ("--probe --against {tmp}/nowhere", None, ("nowhere",)),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(name, cli, tmp_path):
    arguments, make, words = BAD_INPUT[name]
    if make is not None:
        make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    filled = arguments.replace("{tmp}", str(tmp_path)).replace("{valid}", str(VALID))
    done = cli("eval", BUNDLED, *filled.split(), *([] if "-o" in filled else ["-o", tmp_path / "out"]))
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    assert [word for word in words if word not in done.err] == [], done.err
    assert sorted(tmp_path.rglob("*")) == before

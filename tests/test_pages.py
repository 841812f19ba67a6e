"""Pages and `anymla compare`: what they hold, that they need nothing else, and what is refused."""

import json
import math
import shutil

import pytest

import anymla
from anymla.report.chart import Chart, Series
from anymla.report.page import Cell, Page, Section, Table, record
from tests.damage import BUNDLED, TRAIN, VALID, run_main
from tests.families import FAST
from tests.family_models import tiny_model
from tests.pages import check_page

CONVERT = {"kv_cache": 0.5, "calibration": str(TRAIN), **FAST}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on the bundled model, with an evaluation text."""
    folder = tmp_path_factory.mktemp("ran") / "out"
    anymla.run(BUNDLED, folder, steps=[{"mla": CONVERT}], text=VALID, context=300)
    return folder


def words(page):
    return " ".join(" ".join(page.text).split())


def test_the_page_of_a_run(ran):
    told = json.loads((ran / "run.json").read_text())
    text = words(check_page(ran / "report.html", told))
    for shown in ("original", "1 mla", "cache at 300 tokens", f"anymla chat {ran}", f"anymla export {ran} --to vllm"):
        assert shown in text
    quality = told["steps"][0]["quality"]
    assert f"{quality['kl']:.4f}" in text and f"{quality['perplexity']:.3f}" in text
    page = (ran / "report.html").read_text()
    assert "arxiv.org/abs/2405.04434" in page and page.count("<figure>") >= 2


def test_the_page_of_a_conversion(converted_folder):
    told = json.loads((converted_folder / "conversion.json").read_text())
    check_page(
        converted_folder / "report.html",
        told | {"account": json.loads((converted_folder / "account.json").read_text())},
    )
    assert "Error of the hidden states by layer" in (converted_folder / "report.html").read_text()


def test_a_stock_checkpoint_is_served_as_such(tmp_path):
    settings = {"kv_heads": 2, "calibration_tokens": 1024, "calibration_length": 64}
    anymla.run(BUNDLED, tmp_path / "out", steps=[{"kv_heads": settings}])
    text = words(check_page(tmp_path / "out" / "report.html", json.loads((tmp_path / "out" / "run.json").read_text())))
    for shown in ("vllm serve", "convert_hf_to_gguf.py", "llama-server", "No text was given"):
        assert shown in text
    assert "trust-remote-code" not in text and "anymla export" not in text


def test_compare(ran, tmp_path, monkeypatch, capfd):
    command = ["compare", str(BUNDLED), str(ran), "--text", str(VALID), "--tokens", "512", "--length", "128"]
    run = run_main([*command, "--context", "300", "-o", str(tmp_path / "cmp"), "--json"], monkeypatch, capfd)
    assert (run.code, run.err) == (0, "") and run.progress
    told = json.loads(run.out)
    assert told == json.loads((tmp_path / "cmp" / "results.json").read_text())
    assert sorted(path.name for path in (tmp_path / "cmp").iterdir()) == ["report.html", "results.json"]
    text = words(check_page(tmp_path / "cmp" / "report.html", told))
    for shown in (
        "stories260K",
        "cache at 300 tokens",
        "share",
        "50 %",
        "reading (s)",
        "512 tokens of",
        "windows of 128",
    ):
        assert shown in text
    first, second = told["models"]
    assert f"{second['quality']['kl']:.4f} ± {second['quality']['kl_error']:.2g}" in text
    assert first["quality"]["kl"] == 0 and first["quality"]["top1_agreement"] == 1
    scores = anymla.evaluate(ran, VALID, against=BUNDLED, tokens=512, length=128)
    for name in ("perplexity", "kl", "kl_error", "top1_agreement", "tokens"):
        assert second["quality"][name] == pytest.approx(getattr(scores, name), rel=1e-6)
    cost, account = second["account"], json.loads((ran / "account.json").read_text())
    assert (
        cost["cache_bytes_per_token"] == scores.cache_bytes_per_token == first["account"]["cache_bytes_per_token"] / 2
    )
    assert cost["weight_bytes"] == account["weight_bytes"]
    assert cost["cache_bytes_at_context"] == 300 * cost["cache_bytes_per_token"]
    assert first["seconds"] > 0 and second["seconds"] > 0


def test_compare_to_a_teacher_that_is_no_folder_of_anymla(ran, tmp_path, monkeypatch, capfd):
    command = [
        "compare",
        str(ran),
        "--teacher",
        str(BUNDLED),
        "--text",
        str(VALID),
        "--tokens",
        "256",
        "--length",
        "64",
    ]
    monkeypatch.chdir(tmp_path)
    run = run_main(command, monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    assert "KL" in run.out and "Report: anymla-comparison/report.html" in run.out
    told = json.loads((tmp_path / "anymla-comparison" / "results.json").read_text())
    assert [model["name"] for model in told["models"]] == [str(BUNDLED), str(ran)]
    assert told["settings"]["teacher"] == str(BUNDLED)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "needs two models"),
        (["{tmp}/nowhere"], "nowhere"),
        (["{tmp}/wider"], "vocabulary"),
        (["{tmp}/reading"], "tokenizers"),
        (["{tmp}/empty"], "model.safetensors"),
    ],
)
def test_what_cannot_be_compared(others, message, tmp_path, monkeypatch, capfd):
    wider = tiny_model("llama", vocab_size=600)
    for name in ("wider", "reading", "empty"):
        shutil.copytree(BUNDLED, tmp_path / name)
    wider.save_pretrained(tmp_path / "wider")
    (tmp_path / "empty" / "model.safetensors").unlink()
    tokenizer = json.loads((tmp_path / "reading" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁and"] = vocabulary["▁and"], vocabulary["▁the"]
    (tmp_path / "reading" / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = [each.format(tmp=tmp_path) for each in others]
    command = ["compare", str(BUNDLED), *named, "--text", str(VALID), "--tokens", "256", "-o", str(tmp_path / "cmp")]
    run = run_main(command, monkeypatch, capfd)
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1), run.err
    assert message in run.err and not (tmp_path / "cmp").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.txt").write_text("mine")
    command = ["compare", str(BUNDLED), "x", "--text", str(VALID), "-o", str(tmp_path)]
    run = run_main(command, monkeypatch, capfd)
    assert run.code == 1 and "choose another -o" in run.err and (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(1e-5, 3e-5), (0.2, 40.0), (7.0, 7.0), (3.0, 123456.0), (1.0,)])
def test_every_point_and_tick_is_on_the_drawing(values, log):
    series = (
        Series(name="a", points=tuple(enumerate(values))),
        Series(name="b", points=((5.0, values[0]),)),
    )
    chart = Chart(title="t", x_label="x", y_label="y", series=series, level=("level", values[-1]), log=log)
    marks = [mark for line in chart.lines for mark in line.marks]
    places = [mark.y for mark in marks] + [tick.place for tick in chart.y_ticks] + [chart.level_place]
    assert all(chart.top - 1e-6 <= place <= chart.bottom + 1e-6 for place in places)
    across = [mark.x for mark in marks] + [tick.place for tick in chart.x_ticks]
    assert all(chart.left - 1e-6 <= place <= chart.right + 1e-6 for place in across)
    assert 2 <= len(chart.y_ticks) <= 9 and len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks)
    heights = [mark.y for mark in chart.lines[0].marks]
    assert heights == sorted(heights, reverse=True)  # a larger value is higher up
    assert f"{len(values)} points" in chart.alt and math.isfinite(sum(places))


def test_what_a_page_is_given_is_shown_as_text(tmp_path):
    told = {
        "name": "<script>alert(1)</script>",
        "odd \udcff": [1, [2.5]],
        "list": [{"a": 1e-12, "b": {"c": 3}}, {"a": None}],
    }
    table = Table(columns=("<b>", "n"), rows=((Cell("<i>", link=None), Cell("4", 4.0)),))
    Page(title="<u>", lead="&", sections=(Section(heading="h", tables=(table,)), record("x.json", told))).write(
        tmp_path
    )
    page = check_page(tmp_path / "report.html", told)
    assert not {"b", "i", "u"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text and "b.c" in page.text


def test_a_copy_of_a_checkpoint_has_no_page_of_the_other(ran, tmp_path):
    from anymla.io.checkpoint import copy_companions

    copy_companions(ran, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "report.html").exists()

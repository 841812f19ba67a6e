"""lm-eval's tasks on a model in memory, by a local task file and local data."""

import functools
import json
import sys

import pytest

import anymla
from anymla.evaluation import tasks as evaluation_tasks
from tests.damage import BUNDLED, TRAIN, run_main

lm_tasks = pytest.importorskip("lm_eval.tasks")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
QUESTIONS = [  # the first of two is meant
    ("Once upon a", "time", "zebra"),
    ("Once upon a time, there was a little girl named", "Lily", "because"),
    ("She was very", "happy", "upon"),
    ("They went to the", "and", "park"),  # the model knows better
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files ``words`` and ``nodata``, whose file is not there; the data set's cache is below tmp as well."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    place = tmp_path / "tasks"
    place.mkdir()
    rows = [{"question": asked, "choices": list(choices), "answer": 0} for asked, *choices in QUESTIONS]
    (place / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "words.yaml").write_text(TASK.format(name="words", data=place / "words.jsonl"))
    (place / "nodata.yaml").write_text(TASK.format(name="nodata", data=place / "nowhere.jsonl"))
    return place


def message_of(arguments, monkeypatch, capfd):
    done = run_main([str(argument) for argument in arguments], monkeypatch, capfd)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1), done
    return done.err


def test_original_and_full_budget_are_equal(folder, tmp_path):
    same = tmp_path / "same"
    anymla.convert(
        BUNDLED, same, kv_cache=1.0, codec="none", calibration=TRAIN, calibration_tokens=2048, calibration_length=64
    )
    wanted = anymla.Benchmarks(tasks=("words",), include_path=folder)
    evaluation = anymla.evaluate(same, against=BUNDLED, benchmarks=wanted)
    (row,) = evaluation.benchmarks["tasks"]
    assert (row.model.name, row.model.metric, row.model.samples) == ("words", "acc", 4)
    assert row.model.value == row.original.value == 0.75
    assert row.model.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert (row.difference, row.difference_stderr) == (0, 0)
    assert dict(row.model.facts) == {"shots": 0, "version": 2.0}
    assert {"lm-eval", "datasets"} <= set(evaluation.versions)


@pytest.fixture
def own_alone(monkeypatch):
    """lm-eval without its own 14,000 tasks, which take it 15 seconds to find."""
    without = functools.partial(lm_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_tasks, "TaskManager", lambda include_path, **_: without(include_path=include_path))


def test_command_line(folder, own_alone, monkeypatch, capfd):
    options = ["--include-path", folder, "--limit", "3", "--num-fewshot", "1", "--json"]
    done = run_main([str(part) for part in ["eval", BUNDLED, "--tasks", "wor*", *options]], monkeypatch, capfd)
    assert (done.code, done.err) == (0, "")
    (row,) = json.loads(done.out)["tasks"]
    assert (row["name"], row["samples"], row["shots"], row["original"]) == ("words", 3, 1, None)


def test_data_that_is_not_there(folder, monkeypatch, capfd):
    message = message_of(["eval", BUNDLED, "--tasks", "nodata", "--include-path", folder], monkeypatch, capfd)
    assert "--tasks nodata" in message
    assert "nowhere.jsonl" in message


def test_unknown_task(folder, own_alone, monkeypatch, capfd):
    message = message_of(["eval", BUNDLED, "--tasks", "words,wrods", "--include-path", folder], monkeypatch, capfd)
    assert "--tasks wrods" in message
    assert "near it: words" in message


def test_without_lm_eval(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'anymla[eval]'" in message_of(["eval", BUNDLED, "--tasks", "words"], monkeypatch, capfd)


def test_include_path_must_be_a_folder(tmp_path, monkeypatch, capfd):
    arguments = ["eval", BUNDLED, "--tasks", "words", "--include-path", tmp_path / "nowhere"]
    assert "--include-path" in message_of(arguments, monkeypatch, capfd)


def test_groups_filters_and_what_is_no_mean():
    """A result as lm-eval gives it."""
    results = {
        "results": {
            "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "part": {"alias": " - part", "match,strict": 0.5, "match_stderr,strict": "N/A", "f1,none": 0.7},
        },
        "group_subtasks": {"whole": ["part"], "part": []},
        "samples": {
            "part": [
                {"filter": "strict", "match": 1.0, "f1": 0.0},
                {"filter": "strict", "match": 0.0, "f1": 0.0},
                {"filter": "none", "match": 0.0, "f1": 0.1},
            ]
        },
        "n-samples": {"part": {"original": 2, "effective": 2}},
        "higher_is_better": {"part": {"match": True, "f1": True}, "whole": {"acc": True}},
        "n-shot": {"part": 5},
        "versions": {"part": 1.0},
    }
    whole, strict, f1 = evaluation_tasks._measures(results)
    assert (whole.name, whole.stderr, whole.samples, whole.part_of) == ("whole", 0.1, None, None)
    assert (strict.metric, strict.stderr, list(strict.outcomes), strict.part_of) == (
        "match, strict",
        None,
        [1.0, 0.0],
        "whole",
    )
    assert list(f1.outcomes) == []  # 0.7 is not the mean of what its items gave

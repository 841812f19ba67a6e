"""How far a command is: lines on a stderr that is no terminal, a bar on one that is, and nothing on stdout."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.console import Console

from anymla.cli import progress
from anymla.errors import CheckpointError
from anymla.io.download import listening
from anymla.io.find import find_model
from anymla.io.telling import hearing, told
from anymla.sweep.run import _done
from tests.damage import BUNDLED, FAST, PROGRESS, TRAIN, VALID, Run, run_main
from tests.hub_server import hub_of

LINE = re.compile(r"\w+: .+ (\d+) of (\d+)(?: \(.+\))?, (\d+) s(?:, about (\d+) s left)?\n?")


class Clock:
    """Seconds that pass when told so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def log():
    """Lines of `convert`, unstarted, with a clock: nothing beats of itself."""
    lines = progress.Lines("convert", io.StringIO(), clock := Clock())

    def step(seconds, *report):
        clock.now += seconds
        lines(*report)
        return lines.stream.getvalue().splitlines()

    step.lines, step.clock = lines, clock
    return step


def end(log):
    log.lines._thread.start()
    log.lines.__exit__(None)
    return log.lines.stream.getvalue().splitlines()


def numbers(line):
    """Done, total, seconds and seconds left of a line."""
    return tuple(None if number is None else int(number) for number in LINE.fullmatch(line).groups())


def steps_of(run):
    """The lines that tell of a step's end; others say that the command is at work."""
    assert (run.code, run.err) == (0, "")
    return [line for line in run.progress if " so far" not in line]


def test_at_most_a_line_in_thirty_seconds(log):
    log(0, 0, None, "reading")
    for layer in range(1, 31):
        log(10, layer, 30, "layer", f"2K=16 r={layer}")
    log(0, 0, None, "scoring and writing")
    lines = end(log)
    assert [numbers(line)[0] for line in lines] == [1, *range(4, 30, 3), 30]
    assert lines[1] == "convert: layer 4 of 30 (2K=16 r=4), 40 s, about 260 s left"
    assert lines[-1] == "convert: layer 30 of 30 (2K=16 r=30), 300 s"


def test_a_line_each_where_layers_take_long(log):
    for layer in range(1, 6):
        log(45, layer, 5, "layer")
    assert [numbers(line)[0] for line in end(log)] == [1, 2, 3, 4, 5]


def test_seconds_left_are_those_of_this_run(log):
    log(0, 0, None, "reading")
    log(500, 20, 30, "layer")  # where the stopped run was
    lines = log(60, 21, 30, "layer")
    assert numbers(lines[0]) == (20, 30, 500, None)
    assert numbers(lines[1]) == (21, 30, 560, 540)


def test_reading_is_not_taken_for_a_step(log):
    log(0, 0, None, "reading")
    log(300, 1, 10, "layer")
    assert numbers(log(40, 2, 10, "layer")[-1]) == (2, 10, 340, 320)


def test_steps_that_begin_at_a_known_time_are_estimated_at_once(log):
    log(9, 0, 40, "text:")
    assert log(2, 1, 40, "text:") == ["convert: text: 1 of 40, 11 s, about 78 s left"]


def test_long_steps_beat(log):
    log(0, 0, None, "reading")
    for _ in range(90):
        log.clock.now += 1
        log.lines.beat()
    assert log.lines.stream.getvalue().splitlines() == [
        f"convert: reading, {seconds} s so far" for seconds in (10, 40, 70)
    ]
    log(10, 1, 10, "layer")
    log(50, 2, 10, "layer")
    for _ in range(100):
        log.clock.now += 1
        log.lines.beat()
    said = [line for line in log.lines.stream.getvalue().splitlines() if "2 of 10" in line]
    assert said == [
        "convert: layer 2 of 10, 150 s, about 400 s left",
        "convert: layer 2 of 10 done, 180 s so far, about 370 s left",
        "convert: layer 2 of 10 done, 210 s so far, about 350 s left",  # the step takes longer than those before
        "convert: layer 2 of 10 done, 240 s so far, about 350 s left",
    ]


def test_short_steps_tell_of_themselves(log):
    """Every line is of a step's end, though the command is asked each second whether it is at work."""
    for step in range(1, 21):
        for _ in range(5):
            log.clock.now += 1
            log.lines.beat()
        log(0, step, 20, "step")
    lines = log.lines.stream.getvalue().splitlines()
    assert [numbers(line)[0] for line in lines] == [1, 7, 13, 19]


def test_short_phases_are_few_lines(log):
    for phase in ("probe, model", "probe, original", "blimp, model", "blimp, original", "text"):
        log(0, 0, 8, phase)
        for step in range(1, 9):
            log(0.1, step, 8, phase)
    lines = end(log)
    assert [line.split(",")[0] for line in lines[:1]] == ["convert: probe"]
    assert len(lines) == 3 and lines[-1].startswith("convert: text 8 of 8, ")


def test_an_error_ends_the_lines(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    stream = io.StringIO()
    with pytest.raises(CheckpointError), progress.Lines("convert", stream) as lines:
        lines(1, 3, "layer")
        raise CheckpointError("broken")
    assert not [thread for thread in threading.enumerate() if thread is lines._thread]
    written = stream.getvalue()
    time.sleep(1.2)
    assert stream.getvalue() == written == "convert: layer 1 of 3, 0 s\n"


def test_a_long_step_says_what_it_is_at(log):
    log.lines.part("checking the weights")
    log.clock.now += 11
    log.lines.beat()
    assert log.lines.stream.getvalue() == "convert: checking the weights, 11 s so far\n"
    log(9, 1, 4, "layer")
    with hearing(log.lines.part):
        steps = told(range(300), "gradient step")
        next(steps), next(steps)
    log.clock.now += 40
    log.lines.beat()
    last = log.lines.stream.getvalue().splitlines()[-1]
    assert last == "convert: layer 1 of 4 done, gradient step 2 of 300, 60 s so far"
    log(31, 2, 4, "layer")
    assert "gradient" not in log.lines.stream.getvalue().splitlines()[-1]


def test_a_bar_says_what_a_step_is_at():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with progress.Bar(console) as bar:
        bar.part("checking the weights")
        bar(1, 3, "layer")
        bar.part("layer 2 of 3: new weights")
        bar.live.refresh()
    drawn = console.file.getvalue()
    assert "checking the weights" in drawn and "layer; layer 2 of 3: new weights" in drawn


def test_a_log_that_is_gone_stops_nothing():
    stream = io.StringIO()
    stream.close()
    with progress.Lines("convert", stream) as lines:
        lines(1, 2, "layer")


def test_the_clock_of_a_running_command_beats(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.5)
    monkeypatch.setattr(progress, "LONG", 0.5)
    stream = io.StringIO()
    with progress.Lines("push", stream):
        time.sleep(2.3)
    assert stream.getvalue().startswith("push: 1 s so far\n")


def test_only_the_first_process_speaks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with progress.shown("convert") as report:
        report(1, 2, "layer", detail="2K=2 r=6")
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    with progress.shown("convert") as report:
        report(0, None, "reading")
        for layer in (1, 2, 3):
            report(layer, 3, "layer", f"2K=2 r={layer}")
        report(0, None, "scoring and writing")
    drawn = console.file.getvalue()
    assert "━" in drawn and "layer 2K=2 r=3" in drawn and "3 of 3" in drawn and "scoring and writing" in drawn
    assert not [line for line in drawn.splitlines() if PROGRESS.match(line)]


def test_bars_of_tracked_steps_go_with_them(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    bar = progress.Bar(console)
    for step in progress.tracked(bar)(["a", "b"], "probe, model"):
        assert step in "ab" and bar.live is not None
    assert bar.live is None
    assert "2 of 2" in console.file.getvalue()


def test_convert_says_how_far_it_is(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    arguments = ["convert", BUNDLED, "-o", tmp_path / "out", *FAST.split(), "--calibration", TRAIN, "--json"]
    run = run_main([str(part) for part in arguments], monkeypatch, capfd)
    steps = steps_of(run)
    assert [numbers(line)[:2] for line in steps] == [(layer, 5) for layer in range(1, 6)]
    assert re.match(r"convert: layer 2 of 5 \(2K=\d+ r=\d+\), \d+ s, about \d+ s left\n", steps[1])
    assert json.loads(run.out)["layers"]


def test_a_redirected_conversion_writes_lines(tmp_path):
    """As users run it: in a process of its own, both streams in files."""
    arguments = ["convert", BUNDLED, "-o", tmp_path / "out", *FAST.split(), "--calibration", TRAIN, "--json"]
    console = Path(sys.executable).parent / "anymla"
    with (tmp_path / "out.json").open("w") as out, (tmp_path / "log").open("w") as log:
        subprocess.run([console, *map(str, arguments)], stdout=out, stderr=log, timeout=120, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    done = [numbers(line)[:2] for line in lines if "so far" not in line]
    assert (done[0], done[-1]) == ((1, 5), (5, 5))  # on a busy machine there may be more between them
    assert json.loads((tmp_path / "out.json").read_text())["layers"]


@pytest.mark.parametrize("kind", ["text", "probe", "lambada"])
def test_eval_says_how_far_it_is(kind, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "Once upon a time there was a cat"}\n' * 40)
    what = {"text": ["--text", VALID, "--tokens", 640], "probe": ["--probe"], "lambada": ["--lambada", passages]}
    run = run_main(["eval", str(BUNDLED), "--length", "64", "--json", *map(str, what[kind])], monkeypatch, capfd)
    steps = steps_of(run)
    label = {"text": "text:", "probe": "probe, model:", "lambada": "lambada, model:"}[kind]
    assert all(line.startswith(f"eval: {label} 1 of ") for line in steps[:1]) and "s left" in steps[0]
    done, total, _, left = numbers(steps[-1])
    assert done == total > 1 and left is None
    assert json.loads(run.out)


def test_tune_says_how_far_it_is(converted_folder, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    arguments = ["tune", converted_folder, "--teacher", BUNDLED, "-o", tmp_path / "out", "--tokens", 256]
    arguments += ["--data", TRAIN, "--length", 32, "--eval-tokens", 256, "--json"]
    run = run_main([str(part) for part in arguments], monkeypatch, capfd)
    trials, steps = ([line for line in steps_of(run) if ("trial" in line) is found] for found in (True, False))
    assert re.match(r"tune: trial of rate [\d.e-]+: step 1 of \d+ \(trial, loss [\d.]+\)", trials[0])
    assert [numbers(line)[:2] for line in steps] == [(step, 8) for step in range(1, 9)]
    assert re.match(r"tune: step 2 of 8 \(\w+, loss [\d.]+, [\d,]+ tokens/s\), \d+ s, about \d+ s left\n", steps[1])
    assert json.loads(run.out)["steps"] == 8


def fake_hub(monkeypatch, folder, pieces):
    """A hub client that downloads ``pieces``, as many bytes each, through the bars that it is given."""

    def snapshot_download(name, *, allow_patterns, tqdm_class=None, **_):
        transfer, bar = (tqdm_class(total=0, initial=0, unit="B", unit_scale=True, desc="") for _ in range(2))
        files = tqdm_class(range(2), total=2, desc="Fetching 2 files")
        for _ in files:
            bar.total += sum(pieces)
            bar.refresh()
            for piece in pieces:
                bar.update(piece)
        bar.set_description("Download complete")
        transfer.close()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_model_that_is_nowhere_says_the_way_out():
    with pytest.raises(CheckpointError, match=r"nope is neither a folder here nor reachable on the hub: .*_OFFLINE=0"):
        find_model("nope")


def test_a_hub_without_a_network_is_said_in_a_few_words(monkeypatch):
    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("Please check your connection. " * 20) from OSError("no name service")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    with pytest.raises(CheckpointError, match=r"no network leads there .* \(no name service\)$"):
        find_model("some/model")


def test_an_answer_of_the_hub_is_told_as_it_is(monkeypatch):
    refused = HfHubHTTPError("429 Client Error: too many\nrequests", response=SimpleNamespace(headers={}, request=None))

    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("Please check your connection.") from refused

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    with pytest.raises(CheckpointError, match=r"reachable on the hub: 429 Client Error: too many requests$"):
        find_model("some/model")


@pytest.mark.parametrize("text", ["Short.", f"One. Two is {'long ' * 60}."])
def test_a_reason_ends_with_a_sentence(monkeypatch, text):
    def snapshot_download(*_, **__):
        raise OSError(text)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as refused:
        find_model("nope")
    assert str(refused.value).endswith(("hub: Short.", "hub: One."))


def test_a_download_tells_its_bytes(monkeypatch, capfd):
    fake_hub(monkeypatch, BUNDLED, [300, 700])
    told = []
    with listening(lambda *bytes_: told.append(bytes_)):
        assert find_model("someone/model") == BUNDLED
    assert told == [(300, 1000), (1000, 1000), (1300, 2000), (2000, 2000)]
    assert capfd.readouterr() == ("", "")


def test_the_hub_client_has_its_own_bars_where_nobody_listens(monkeypatch):
    given = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, tqdm_class, **__: given.append(tqdm_class) or str(BUNDLED)
    )
    find_model("someone/model")
    assert given == [None]


@pytest.mark.parametrize("command", ["convert", "eval", "generate"])
def test_commands_show_their_downloads(command, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    fake_hub(monkeypatch, BUNDLED, [3 << 20, 1 << 20])
    rest = {
        "convert": ["-o", tmp_path / "out", *FAST.split(), "--calibration", TRAIN, "--json"],
        "eval": ["--text", VALID, "--tokens", 256, "--length", 64, "--json"],
        "generate": ["--prompt", "Once", "--max-new-tokens", 2],
    }
    run = run_main([command, "someone/model", *map(str, rest[command])], monkeypatch, capfd)
    downloads = [line for line in steps_of(run) if f"{command}: download " in line]
    assert downloads[0].startswith(f"{command}: download 3 MiB of 4 MiB, ")
    assert downloads[-1].startswith(f"{command}: download 8 MiB of 8 MiB, ")
    assert any(re.search(r"download 7 MiB of 8 MiB, \d+ s, about \d+ s left\n", line) for line in downloads)


def test_a_real_client_tells_its_bytes(tmp_path):
    """The installed version of the hub client, in a process of its own, from a hub on this machine."""
    arguments = [Path(sys.executable).parent / "anymla", "generate", "someone/model", "--prompt", "Once"]
    with hub_of(BUNDLED) as address:
        online = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [*arguments, "--max-new-tokens", "2"], capture_output=True, text=True, timeout=120, env=os.environ | online
        )
    run = Run.of(done.returncode, done.stdout, done.stderr)
    assert (run.code, run.err) == (0, "") and run.out.startswith("Once")
    assert re.fullmatch(r"generate: download .+ of 1.0 MiB, \d+ s\n", run.progress[-1])


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ({"layers": [1, 2], "survey": [0] * 5, "gradient_after": 0}, "2 of 5 layers"),
        ({"layers": [], "survey": []}, "0 of 5 layers"),
        ({"layers": [], "survey": [0, 0]}, "2 of 5 passes of calibration"),
        ({"layers": [], "survey": [0] * 5, "gradient_after": 2}, "5 of 5 passes of calibration and 3 backward passes"),
    ],
)
def test_a_stopped_conversion_says_what_is_kept(done, said):
    assert _done(SimpleNamespace(progress=done), 5) == said

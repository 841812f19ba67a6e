"""What is wrong with a text, a path or a device is known before any source is made plain and any weight is read."""

import pytest

from tests.damage import BUNDLED, VALID, run_main

MISSING = "nowhere/text.txt"
STEPS = ("--step", "kv_heads: {kv_heads: 2}", "--step", f"kvquant: {{calibration: {MISSING}}}")
TUNED = ("--step", "mla: {kv_cache: 0.25}", "--step", f"tune: {{data: {VALID}, eval_data: {MISSING}}}")
TUNE = ("tune", BUNDLED, "-o", "out", "--teacher", BUNDLED)
COMMANDS = {
    "convert": (("convert", BUNDLED, "-o", "out", "--calibration", MISSING), "--calibration: text"),
    "convert-device": (("convert", BUNDLED, "-o", "out", "--device", "nothing"), "--device nothing"),
    "convert-folder": (("convert", BUNDLED, "-o", "out", "--calibration", "some/long/name"), "--calibration: text"),
    "run": (("run", BUNDLED, "-o", "out", *STEPS), "step 2, kvquant: calibration: text"),
    "run-tune": (("run", BUNDLED, "-o", "out", *TUNED), "step 2, tune: --eval-data: text"),
    "tune": ((*TUNE, "--data", MISSING), "--data: text"),
    "tune-log": ((*TUNE, "--data", VALID, "--report-to", "x"), "--report-to x"),
    "eval": (("eval", BUNDLED, "--text", MISSING), "--text: text"),
    "eval-against": (("eval", BUNDLED, "--text", VALID, "--against", "./nowhere"), "./nowhere"),
    "eval-blimp": (("eval", BUNDLED, "--blimp", MISSING), f"--blimp {MISSING}"),
    "compare": (("compare", BUNDLED, BUNDLED.parent, "--text", MISSING), "--text: text"),
}


@pytest.fixture
def nothing_read(monkeypatch):
    """Makes any command fail that begins its work."""

    def begun(*_, **__):
        raise AssertionError("the work has begun")

    for module in ("pipeline", "layer_steps", "comparison", "evaluation.evaluate", "training.tune"):
        monkeypatch.setattr(f"anymla.{module}.plain_source", begun)


@pytest.mark.parametrize(("arguments", "words"), COMMANDS.values(), ids=COMMANDS)
def test_what_is_missing_is_known_at_once(arguments, words, nothing_read, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run_main([*map(str, arguments)], monkeypatch, capfd)
    assert done.code == 1
    assert done.err.startswith(f"error: {words}"), done.err
    assert not [*tmp_path.iterdir()]

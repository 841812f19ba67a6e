"""The command line: what each command prints, writes and reads back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from anymla import cli
from anymla.cli.options import print_next
from anymla.methods.mla.settings import MLA
from tests.damage import BUNDLED, FAST, TRAIN, VALID, Run, run_main

SCORES = {
    "perplexity",
    "kl",
    "top1_agreement",
    "cache_bytes_per_token",
    "cache_numbers_per_token_per_layer",
    "cache_window_bytes",
    "kl_error",
    "tokens",
}
LAYERS, NUMBERS, BYTES = 5, 64, 1280  # of the bundled model: cached numbers per token and layer, bytes per token
PROMPT = "Once upon a time"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: threads share sums out in their own order


@pytest.fixture
def wide(monkeypatch):
    """Tables that need not break their cells, whatever terminal the tests run in."""
    monkeypatch.setattr(cli.out, "width", 200)


def convert_arguments(output, *options):
    return ["convert", BUNDLED, "-o", output, *FAST.split(), "--calibration", TRAIN, *options]


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    """One conversion by the command line: where it is, and what --json printed."""
    folder = tmp_path_factory.mktemp("cli") / "converted"
    arguments = [str(argument) for argument in convert_arguments(folder, "--json", "--kv-cache", "0.5")]
    console = Path(sys.executable).parent / "anymla"
    done = subprocess.run([console, *arguments], capture_output=True, text=True, timeout=120, env=ONE_THREAD)
    run = Run.of(done.returncode, done.stdout, done.stderr)
    assert (run.code, run.err) == (0, "")
    return SimpleNamespace(folder=folder, report=json.loads(run.out))


def test_inspect_json(anymla):
    facts = json.loads(anymla("inspect", BUNDLED, "--json"))
    assert (facts["supported"], facts["reason"]) == (True, None)
    assert facts["cache_numbers_per_token_per_layer"] == NUMBERS
    assert facts["cache_bytes_per_token"] == BYTES
    assert facts["num_layers"] == len(facts["layers"]) == LAYERS


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", BUNDLED, "--json"],
        ["inspect", BUNDLED],
        ["inspect", BUNDLED, "--targets"],
        ["plan", BUNDLED],
        ["plan", BUNDLED, "--target", "deepseek"],
        [],
        ["--help"],
        ["methods"],
        ["methods", "--json"],
        ["run", "--help"],
    ],
)
def test_answers_at_once_without_torch(arguments):
    code = (
        "import sys\nfrom anymla import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    sys.stderr.write(str({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "set()")
    assert done.stdout


def test_inspect_table(anymla, wide):
    table = anymla("inspect", BUNDLED)
    for fact in ("llama", "GQA", "8 heads, 4 KV heads, head_dim 8", "1.2 KiB", "320 B", "64", "--kv-cache 0.125"):
        assert fact in table


def test_what_comes_next_names_the_export(capsys):
    for target in (None, "gguf"):
        print_next(Path("OUT"), "MODEL", 1.0, MLA(target=target))
        assert ("anymla export OUT --to gguf -o SERVED" in capsys.readouterr().out) == (target == "gguf")


def test_inspect_knows_a_converted_model(anymla, conversion):
    facts = json.loads(anymla("inspect", conversion.folder, "--json"))
    assert facts["supported"] is False
    assert "already" in facts["reason"]
    assert facts["reason"] in " ".join(anymla("inspect", conversion.folder).split())


def test_plan_json(anymla):
    costs = json.loads(anymla("plan", BUNDLED, "--codec", "none", "--json"))
    assert len(costs["layers"]) == LAYERS
    assert costs["cache_bytes_per_token"] == {"before": BYTES, "after": BYTES // 4}
    assert costs["predicted_peak_bytes"] > 0
    for layer in costs["layers"]:
        assert layer["cached_numbers"] == {"before": NUMBERS, "after": NUMBERS // 4}
        assert layer["rope_dims"] + layer["kv_rank"] == NUMBERS // 4
        assert layer["chosen_on_calibration"] is True


def test_plan_table(anymla, wide):
    table = anymla("plan", BUNDLED, "--rope-dims", "6")
    for number in ("64 -> 16", "12.3k -> ", " 6 ", " 10 ", "1.2 KiB -> 320 B"):
        assert number in table


def test_plan_of_codes(anymla, wide):
    costs = json.loads(anymla("plan", BUNDLED, "--json"))
    assert costs["cache_bytes_per_token"] == {"before": BYTES, "after": BYTES // 16}
    assert costs["recipe"]["transform_coding"]["decode_cost"] == 2
    for layer in costs["layers"]:
        assert layer["multiply_adds"]["after"] <= 2 * layer["multiply_adds"]["before"] == 256
        assert layer["keys"]["multiply_adds"] + layer["values"]["multiply_adds"] == layer["multiply_adds"]["after"]
    assert sum(layer[kind]["bytes"] for layer in costs["layers"] for kind in ("keys", "values")) == BYTES // 16
    rebuilt = json.loads(anymla("plan", BUNDLED, "--json", "--decode-cost", "any"))["layers"][0]
    assert (rebuilt["keys"]["basis"], rebuilt["keys"]["heads_mixed"]) == ("axes", 4)
    assert rebuilt["multiply_adds"]["after"] > 256
    own = json.loads(anymla("plan", BUNDLED, "--json", "--codec", "kvquant"))["layers"][0]
    assert own["keys"]["basis"] == "own" and own["multiply_adds"] == {"before": 128, "after": 128}
    table = anymla("plan", BUNDLED)
    for part in ("--codec auto chose transform_coding", "multiply-adds", f"-> {BYTES // 16} B"):
        assert part in table


def test_a_plan_is_carried_out(anymla, tmp_path):
    plan = tmp_path / "plan.yaml"
    settings = ["--kv-cache", "0.375", "--rope-dims", "8", *FAST.split(), "--calibration", TRAIN]
    said = anymla("plan", BUNDLED, "-o", plan, *settings)
    assert said.startswith("--codec auto chose mla: a plan file") and str(plan) in said.replace("\n", "")
    report = json.loads(anymla("convert", BUNDLED, "-o", tmp_path / "out", "--plan", plan, "--json"))
    planned = yaml.safe_load(plan.read_text())
    assert [layer["cached_numbers"] for layer in planned["layers"]] == LAYERS * [24]
    assert [(layer["rope_dims"], layer["kv_rank"]) for layer in report["layers"]] == LAYERS * [(8, 16)]
    assert report["after"]["cache_numbers_per_token_per_layer"] == 24
    assert report["recipe"] == planned["recipe"]


def test_a_plan_and_its_settings_give_the_same_weights(anymla, conversion, tmp_path):
    plan = tmp_path / "plan.yaml"
    anymla("plan", BUNDLED, "-o", plan, "--kv-cache", "0.5", *FAST.split(), "--calibration", TRAIN)
    anymla("convert", BUNDLED, "-o", tmp_path / "out", "--plan", plan)
    assert weights(tmp_path / "out") == weights(conversion.folder)


def test_convert_json(conversion):
    report = conversion.report
    assert {"before", "after", "layers", "seconds", "peak_rss_bytes", "output", "recipe"} <= set(report)
    assert set(report["before"]) == set(report["after"]) == SCORES
    assert report["output"] == str(conversion.folder)
    assert [layer["layer"] for layer in report["layers"]] == list(range(LAYERS))
    assert all(layer["rope_dims"] + layer["kv_rank"] == NUMBERS // 2 for layer in report["layers"])
    assert 0 < report["seconds"] < 120
    assert 10**7 < report["peak_rss_bytes"] < 10**11


def test_convert_json_scores(conversion):
    before, after = conversion.report["before"], conversion.report["after"]
    assert (before["kl"], before["top1_agreement"]) == (0, 1)
    assert (before["cache_numbers_per_token_per_layer"], before["cache_bytes_per_token"]) == (NUMBERS, BYTES)
    assert (after["cache_numbers_per_token_per_layer"], after["cache_bytes_per_token"]) == (NUMBERS // 2, BYTES // 2)
    assert 1 < before["perplexity"] < after["perplexity"] < 2 * before["perplexity"]
    assert 0 < after["kl"] < 1
    assert 0.5 < after["top1_agreement"] < 1
    assert before["tokens"] == after["tokens"] > 0


def test_convert_writes_its_report(conversion):
    written = json.loads((conversion.folder / "conversion.json").read_text())
    assert written == conversion.report
    plan = yaml.safe_load((conversion.folder / "plan.yaml").read_text())
    assert [layer["cached_numbers"] for layer in plan["layers"]] == LAYERS * [NUMBERS // 2]
    sizes = [(layer["rope_dims"], layer["kv_rank"]) for layer in conversion.report["layers"]]
    assert [(layer["rope_dims"], layer["kv_rank"]) for layer in plan["layers"]] == sizes


def test_the_same_command_gives_the_same_bytes(anymla, conversion, tmp_path):
    anymla(*convert_arguments(tmp_path / "out", "--kv-cache", "0.5"))
    assert weights(tmp_path / "out") == weights(conversion.folder)


def test_another_seed_gives_other_weights(anymla, conversion, tmp_path):
    anymla(*convert_arguments(tmp_path / "out", "--kv-cache", "0.5", "--seed", "1"))
    assert weights(tmp_path / "out") != weights(conversion.folder)


@pytest.mark.parametrize("kind", ["recipe", "plan"])
def test_what_was_written_converts_again_to_the_same_bytes(kind, anymla, conversion, tmp_path):
    anymla("convert", BUNDLED, "-o", tmp_path / "out", f"--{kind}", conversion.folder / f"{kind}.yaml")
    assert weights(tmp_path / "out") == weights(conversion.folder)
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (conversion.folder / "recipe.yaml").read_bytes()


def test_a_plan_of_codes_says_how_long(anymla):
    assert json.loads(anymla("plan", BUNDLED, "--json"))["estimated_seconds"] > 0
    assert "Time of the conversion" in anymla("plan", BUNDLED)


def test_convert_table(anymla, tmp_path, wide):
    table = anymla(*convert_arguments(tmp_path / "out", "--kv-rank", "10"))
    assert "Scores of so few tokens are a rough check" in table
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    for scores in (report["before"], report["after"]):
        assert f"{scores['perplexity']:.3f}" in table
        assert f"{scores['kl']:.4f}" in table
        assert f"{scores['top1_agreement']:.1%}" in table
    for layer in report["layers"]:
        assert f"{layer['error']:.2%}" in table
    assert "320 B" in table
    assert f"Wrote {tmp_path / 'out'}" in table


def test_the_bundled_text_is_noted_in_one_line(monkeypatch, capfd, tmp_path):
    arguments = ["convert", str(BUNDLED), "-o", str(tmp_path / "out"), *FAST.split(), "--json"]
    done = run_main(arguments, monkeypatch, capfd)
    assert done.code == 0
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("note: ")
    assert "--calibration" in done.err
    assert json.loads(done.out)["recipe"]["calibration"] is None


def test_convert_in_small_files(anymla, conversion, tmp_path):
    anymla(*convert_arguments(tmp_path / "out", "--kv-cache", "0.5", "--max-shard-size", "300KB"))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 310_000 for shard in shards)
    model, whole = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", conversion.folder))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_eval_json(anymla, conversion):
    arguments = ["eval", conversion.folder, "--against", BUNDLED, "--text", VALID, "--tokens", "1024", "--length", "64"]
    scores = json.loads(anymla(*arguments, "--json"))
    assert set(scores) == SCORES | {"original"} and set(scores["original"]) == SCORES
    assert scores["original"]["cache_bytes_per_token"] == BYTES
    assert scores["original"]["perplexity"] < scores["perplexity"]
    assert scores["cache_numbers_per_token_per_layer"] == NUMBERS // 2
    assert scores["cache_bytes_per_token"] == BYTES // 2
    assert scores["tokens"] == 1024
    assert 1 < scores["perplexity"] < 50
    assert 0 < scores["kl"] < 1
    assert 0.5 < scores["top1_agreement"] < 1


def test_eval_of_a_model_against_itself(anymla):
    arguments = ["eval", BUNDLED, "--text", VALID, "--tokens", "512", "--length", "64", "--json"]
    alone, itself = json.loads(anymla(*arguments)), json.loads(anymla(*arguments, "--against", BUNDLED))
    assert (alone["kl"], alone["top1_agreement"]) == (None, None)
    assert (itself["kl"], itself["top1_agreement"]) == (0, 1)
    assert alone["perplexity"] == itself["perplexity"]
    assert itself.pop("original") == itself and "original" not in alone
    assert (alone["cache_numbers_per_token_per_layer"], alone["cache_bytes_per_token"]) == (NUMBERS, BYTES)


def test_eval_perplexity_is_that_of_transformers(anymla):
    scores = json.loads(anymla("eval", BUNDLED, "--text", VALID, "--tokens", "512", "--length", "64", "--json"))
    tokenizer, model = AutoTokenizer.from_pretrained(BUNDLED), AutoModelForCausalLM.from_pretrained(BUNDLED)
    stories = [story.strip() for story in VALID.read_text(encoding="utf-8").split("<|endoftext|>")]
    left, rows = [token for story in stories for token in tokenizer(story)["input_ids"]], []
    while len(rows) < 8:  # each window begins with the BOS token, too
        row = [*([1] if left[0] != 1 else []), *left][:64]
        left = left[64 - (left[0] != 1) :]
        rows.append(row)
    ids = torch.tensor(rows)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert scores["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_eval_table(anymla, wide):
    arguments = ["eval", BUNDLED, "--text", VALID, "--tokens", "512", "--length", "64"]
    scores, table = json.loads(anymla(*arguments, "--json")), anymla(*arguments)
    for number in (f"{scores['perplexity']:.3f}", " 64 ", "1.2 KiB", "512"):
        assert number in table


@pytest.mark.parametrize("kind", ["original", "converted"])
def test_generate_is_transformers_own(kind, anymla, conversion):
    folder = BUNDLED if kind == "original" else conversion.folder
    printed = anymla("generate", folder, "--prompt", PROMPT, "--max-new-tokens", "24")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    assert printed.strip() == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert printed.startswith(PROMPT)
    assert tokens.shape[1] == len(tokenizer(PROMPT)["input_ids"]) + 24


def test_generate_draws_by_the_seed(anymla):
    def draw(seed):
        return anymla(
            "generate", BUNDLED, "--prompt", PROMPT, "--max-new-tokens", 24, "--temperature", 1, "--seed", seed
        )

    assert draw(1) == draw(1) != draw(2)

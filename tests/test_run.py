"""Recipes and `anymla run`: what is refused before any weight is read, what is written, how a killed run goes on."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import anymla
from anymla.account import account, measure
from anymla.architectures.model_spec import converted_spec, read_config, read_model_spec
from anymla.data.mixture import Source
from anymla.errors import AnymlaError, OutputError, RecipeError, UnsupportedModelError
from anymla.io.checkpoint import load_model
from anymla.methods.base import Phase, all_methods
from anymla.methods.mla.settings import MLA
from anymla.methods.tune import Tune
from anymla.recipe import Recipe, check_order, composes_with, given_recipe, read_recipe, refused_after, shipped_names
from anymla.training.stages import make_stages
from tests.damage import TRAIN, VALID, Case, run_main
from tests.families import make_model, save_model

CONVERT = {"kv_cache": 0.5, "calibration_tokens": 512, "calibration_length": 64, "reconstruction_steps": 2}
TUNE = {
    "data": [str(TRAIN)],
    "tokens": 512,
    "length": 32,
    "batch": 4,
    "eval_tokens": 256,
    "learning_rate": 0.001,
    "save_every": 2,
    "device": "cpu",
}
STEPS = [{"mla": CONVERT}, {"tune": TUNE}]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {  # of each shipped recipe's config.json: family, vocabulary, context, SIZES, head_dim
    "HuggingFaceTB/SmolLM-135M": ("llama", 49152, 2048, 576, 1536, 30, 9, 3, 64),
    "HuggingFaceTB/SmolLM-360M": ("llama", 49152, 2048, 960, 2560, 32, 15, 5, 64),
    "HuggingFaceTB/SmolLM-1.7B": ("llama", 49152, 2048, 2048, 8192, 24, 32, 32, 64),
    "meta-llama/Llama-2-7b-hf": ("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128),
    "meta-llama/Llama-3.2-1B": ("llama", 128256, 131072, 2048, 8192, 16, 32, 8, 64),
    "meta-llama/Llama-3.1-8B": ("llama", 128256, 131072, 4096, 14336, 32, 32, 8, 128),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 151936, 32768, 1024, 3072, 28, 16, 8, 128),
    "Qwen/Qwen3-8B-Base": ("qwen3", 151936, 32768, 4096, 12288, 36, 32, 8, 128),
}
TIMED = {"conversion.json", "tuning.json", "run.json", "report.html", "metrics.jsonl"}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


class Stop(Exception):
    """Stands for any end that Python sees."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny original."""
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An undisturbed run with its report."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, anymla.run(source, folder, steps=STEPS, text=VALID, context=100, keep_steps=True)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def stop_at(number, after):
    """Progress that raises in a step, once it reported so often."""
    seen = []

    def progress(step_number, _, *told):
        seen.extend([told] if step_number == number and told else [])
        if len(seen) == after:
            raise Stop

    return progress


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_can_be_planned(name):
    model = "HuggingFaceTB/SmolLM-135M" if name == "paper" else None
    recipe = read_recipe(name, model=model)
    assert Recipe.of(yaml.safe_load(recipe.to_yaml())) == recipe
    family, vocabulary, context, *sizes, head_dim = MODELS[recipe.model]
    facts = {"model_type": family, "vocab_size": vocabulary, "max_position_embeddings": context, "head_dim": head_dim}
    spec = read_model_spec(facts | dict(zip(SIZES, sizes)) | {"hidden_act": "silu", "dtype": "bfloat16"})
    conversion, tuning = recipe.steps
    if name == "paper":
        tuning = Tune.of(tuning.model_dump() | {"data": ["text.jsonl"]})
        recipe = Recipe.of({"model": model, "steps": [conversion, tuning]})
    after = recipe.plan(spec)
    before = account(spec).cache_bytes_per_token
    assert account(after[0]).cache_bytes_per_token <= conversion.kv_cache * before
    assert after[1] == after[0]
    assert sum(Source.of(text).share for text in tuning.data) == pytest.approx(1)
    assert make_stages(tuning, tuning.tokens or 1_000_000, tuning.length, 8)


def test_a_shipped_recipe_runs_with_another_model_and_text(source, tmp_path, monkeypatch, capfd):
    settings = [f"mla.{name}={value}" for name, value in CONVERT.items()]
    settings += [f"tune.{name}={value}" for name, value in TUNE.items() if name != "data"]
    settings += ["mla.calibration=null", f"tune.data={TRAIN}"]
    given = [part for setting in settings for part in ("--set", setting)]
    arguments = ["run", "smollm-135m", "--model", str(source), "-o", str(tmp_path / "out"), "--context", "64", *given]
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, run.err.count("\n")) == (0, 0), run.err
    assert run.progress
    for words in ("after step 1, mla", "after step 2, tune", "at 64 tokens"):
        assert words in run.out
    assert load_model(tmp_path / "out")


def test_what_a_run_writes(whole, source):
    folder, report = whole
    written = json.loads((folder / "run.json").read_text())
    assert written == report.to_dict()
    assert [step["name"] for step in written["steps"]] == ["mla", "tune"]
    assert written["steps"][0]["settings"]["kv_cache"] == 0.5
    assert read_recipe(folder / "recipe.yaml") == report.recipe
    first, second = report.steps
    assert first.account.cache_bytes_per_token * 2 == report.original.account.cache_bytes_per_token
    assert second.account.cache_bytes_at_context == 100 * second.account.cache_bytes_per_token
    assert report.original.quality.kl is None
    assert first.quality.kl > 0 and first.quality.top1_agreement < 1
    told, found = json.loads((folder / "account.json").read_text()), measure(load_model(folder))
    for name in ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once"):
        assert told[name] == told["measured"][name] == getattr(found, name) == getattr(second.account, name)
    assert sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()) == told["weight_bytes"]


def test_kept_steps_name_where_they_are(whole):
    step = whole[0].with_name("out-steps") / "step-1-mla"
    assert json.loads((step / "conversion.json").read_text())["output"] == str(step)
    page = (step / "report.html").read_text()
    assert f"anymla chat {step} " in page and ".work" not in page


def test_steps_are_what_convert_and_tune_write(whole, source, tmp_path):
    kept = whole[0].with_name("out-steps")
    anymla.convert(source, tmp_path / "converted", **CONVERT)
    assert files_of(kept / "step-1-mla") == files_of(tmp_path / "converted")
    anymla.tune(tmp_path / "converted", tmp_path / "tuned", teacher=source, **TUNE)
    ours, theirs = files_of(whole[0]), files_of(tmp_path / "tuned")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"recipe.yaml"}
    assert sorted(path.name for path in whole[0].parent.iterdir()) == ["out", "out-steps"]


@pytest.mark.parametrize(("number", "after"), [(1, 1), (2, 3)])
def test_a_stopped_run_goes_on_inside_the_step(number, after, whole, source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        anymla.run(source, out, steps=STEPS, progress=stop_at(number, after))
    with pytest.raises(OutputError, match=r"step 1 kv_cache 0.5 and not 0.25.*--restart"):
        anymla.run(source, out, steps=[{"mla": CONVERT | {"kv_cache": 0.25}}, {"tune": TUNE}])
    seen = []
    anymla.run(source, out, steps=STEPS, progress=lambda at, _, *now: seen.extend([(at, now)] if now else []))
    if number == 1:
        assert seen[0][1][0] == 1  # layers of the first step that were kept
    else:
        assert {at for at, _ in seen} == {2}
        assert seen[0][1][0].loss is None and seen[0][1][0].step > 0
    assert {name: content for name, content in files_of(out).items() if name != "recipe.yaml"} == {
        name: content for name, content in files_of(whole[0]).items() if name != "recipe.yaml"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fewer_layers_are_not_tuned_layer_by_layer(source, tmp_path):
    """And the user is told so."""
    fewer = {"remove": 1, "strategy": "last", "protect_first": 0, "protect_last": 0}
    fewer |= {"calibration_tokens": 512, "calibration_length": 64}
    told = []
    anymla.run(
        source,
        tmp_path / "out",
        steps=[{"mka": fewer}, {"tune": TUNE | {"tokens": 256, "layerwise": 0.1}}],
        note=told.append,
    )
    assert [note for note in told if "layerwise 0" in note]


def test_restart_begins_anew(source, tmp_path):
    with pytest.raises(Stop):
        anymla.run(source, tmp_path / "out", steps=STEPS[:1], progress=stop_at(1, 1))
    report = anymla.run(source, tmp_path / "out", steps=[{"mla": CONVERT | {"kv_cache": 0.25}}], restart=True)
    assert report.steps[0].settings["kv_cache"] == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_anywhere(source, tmp_path):
    """As convert: killed before file operations in either step and between them, the same bytes come out."""
    arguments = [str(source), str(tmp_path), "11", "8", json.dumps(STEPS)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_kill_points", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["trials"]) == 8
    for trial in report["trials"]:
        assert (trial["killed"], trial["code"], trial["different"], trial["left"]) == (True, 0, [], ["out"]), trial
    assert {trial["step"] for trial in report["trials"]} >= {1, 2}


RUN = "run {model} -o {out} --step"
BAD = [
    Case("nothing", "run {tmp}/no -o {out}", ("neither a recipe's file", "smollm-135m")),
    Case("model-without-steps", "run {model} -o {out}", ("{tmp}/model", "--step")),
    Case("no-model", "run {tmp}/modelless.yaml -o {out}", ("model",)),
    Case("unknown-step", f"{RUN} mla --step mlb", ("step 2", "mlb", "mla, shared_attention, tune")),
    Case("unknown-setting", f"{RUN} mla:{{kv_cash:0.5}}", ("step 1",)),
    Case("near-step", f"{RUN} kvqant", ("step 1: kvqant is no step (did you mean kvquant?)",)),
    Case(
        "unknown-setting-in-a-file",
        "run {tmp}/typo.yaml -o {out}",
        ("typo.yaml", "step 2", "no setting 'tokenz' (did you mean tokens?)"),
    ),
    Case("no-steps", "run {tmp}/flat.yaml -o {out}", ("flat.yaml", "there are no steps")),
    Case("two-of-the-same", f"{RUN} mla --step mla", ("step 2, mla", "cannot follow mla")),
    Case("nothing-to-tune", f"{RUN} tune", ("step 1, tune", "put the step mla before it")),
    Case("no-data", f"{RUN} mla --step tune", ("step 2, tune", "no data")),
    Case("too-small", "run {tmp}/small.yaml -o {out}", ("--kv-cache", "smallest possible")),
    Case("text-missing", f"{RUN} mla --text {{tmp}}/no.txt", ("no.txt", "not a readable file")),
    Case("data-missing", "run {tmp}/dataless.yaml -o {out}", ("no.txt", "not a readable file")),
    Case("set-unknown", f"{RUN} mla --set tune.tokens=5", ("tune", "no step")),
    Case("set-odd", f"{RUN} mla --set tokens", ("--set tokens",)),
    Case("output-is-source", "run {model} -o {model} --step mla", ("source checkpoint",)),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_refused_in_one_line_before_weights_are_read(case, tmp_path, monkeypatch, capfd):
    arguments = case.prepare(tmp_path)
    if case.id != "output-is-source":
        (tmp_path / "model" / "model.safetensors").unlink()
    small = f"model: {tmp_path}/model\nsteps:\n"
    files = {
        "modelless": "steps: [mla]\n",
        "typo": f"{small}- mla\n- tune: {{tokenz: 5}}\n",
        "flat": "kv_cache: 0.5\n",
        "small": f"{small}- mla: {{kv_cache: 0.001}}\n",
        "dataless": f"{small}- mla\n- tune: {{data: [{tmp_path}/no.txt]}}\n",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1), run.err
    assert run.err.startswith("error: ")
    assert case.missing_words(tmp_path, run.err) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class Early(MLA):
    """Stands for a method of an earlier phase."""

    phase = Phase.WIDTH


class Late(Early):
    """Stands for a method of the last phase."""

    phase, excludes = Phase.CACHE, ("tune",)


def test_the_order_of_phases():
    check_order((Early(), MLA(), Tune(), Tune()))
    check_order((Early(), Tune(), MLA(), Tune()))
    with pytest.raises(RecipeError, match="step 2, mla, cannot follow mla: WIDTH comes before ATTENTION"):
        check_order((MLA(), Early()))
    assert refused_after(Tune, Late) == "they do not go together"
    assert composes_with(MLA, [MLA, Tune]) == ["tune"]


def test_a_step_that_refuses_the_model(source):
    recipe = Recipe.of({"model": "m", "steps": [{"mla": {"target": "gguf", "exact_window": 8}}]})
    with pytest.raises(UnsupportedModelError, match=r"step 1, mla, cannot have m: --exact-window"):
        recipe.plan(read_model_spec(read_config(source)))


def test_what_was_converted_can_be_tuned(whole, source, tmp_path):
    kept = whole[0].with_name("out-steps") / "step-1-mla"
    assert converted_spec(read_config(kept)).layers[0].latent is not None
    recipe = Recipe.of({"model": str(kept), "teacher": str(source), "steps": [{"tune": TUNE}]})
    anymla.run(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    with pytest.raises(AnymlaError, match="already has latent attention"):
        anymla.run(kept, tmp_path / "again", steps=["mla"])


def test_a_command_line_is_a_recipe():
    recipe = given_recipe("m", ["mla: {kv_cache: 0.5}", "tune"], ["tune.data=a.txt", "mla.seed=3"], {"text": "t.txt"})
    assert recipe == Recipe.of(
        {"model": "m", "text": "t.txt", "steps": [{"mla": {"kv_cache": 0.5, "seed": 3}}, {"tune": {"data": "a.txt"}}]}
    )


def test_a_run_without_a_text_says_that_quality_was_not_measured(source, tmp_path, monkeypatch, capfd):
    done = run_main(["run", str(source), "-o", str(tmp_path / "out"), "--step", "rtn: {group: 16}"], monkeypatch, capfd)
    assert done.code == 0 and "Quality was not measured: --text" in done.out and "perplexity" not in done.out


def test_run_json(source, tmp_path, monkeypatch, capfd):
    step = yaml.safe_dump({"mla": CONVERT}, default_flow_style=True)
    arguments = ["run", str(source), "-o", str(tmp_path / "out"), "--step", step, "--text", str(VALID), "--json"]
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    report = json.loads(run.out)
    assert report == json.loads((tmp_path / "out" / "run.json").read_text())
    assert {"output", "model", "recipe", "original", "steps", "seconds"} <= report.keys()
    assert report["steps"][0].keys() == {"name", "settings", "account", "quality", "seconds"}


def test_methods_json(monkeypatch, capfd):
    run = run_main(["methods", "--json"], monkeypatch, capfd)
    facts = {fact["name"]: fact for fact in json.loads(run.out)}
    assert facts.keys() == all_methods().keys() >= {"mla", "tune"}
    for fact in facts.values():
        assert {"name", "paper", "phase", "saves", "composes_with", "summary"} == fact.keys()
    assert facts["mla"]["saves"] == ["cache"] and "tune" in facts["mla"]["composes_with"]
    table = run_main(["methods"], monkeypatch, capfd).out
    assert "mla" in table and "tune" in table


def test_recipes_load_no_torch():
    code = "import sys, anymla; anymla.Recipe, anymla.run; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

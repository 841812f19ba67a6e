"""Recovery training in this process: losses, packing, mixtures, adapters, recipes, and what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.mixture import packed_rows
from anymla.data.packing import check_packing
from anymla.errors import OutputError, RecipeError
from anymla.evaluation.logits import Logits, at_head
from anymla.io.checkpoint import load_model, load_tokenizer
from anymla.methods.tune import Tune
from anymla.recipe import read_mla, read_recipe, read_tune, shipped_names
from anymla.report.tuning import _curves
from anymla.training.losses import layer_loss, shares, sum_of_parts, token_kl, token_loss
from anymla.training.pairs import AttentionPairs
from anymla.training.parameters import always_expand, attention_names, choose_learning, with_adapters
from anymla.training.stages import make_stages, save_tuned
from tests.damage import BUNDLED, TRAIN, VALID, Case, run_main
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.pages import check_page

TINY = {"data": [str(TRAIN)], "length": 64, "eval_data": str(VALID), "eval_tokens": 256, "device": "cpu"}
TINY |= {"learning_rate": 0.001}


def test_an_original_in_16_bits_teaches_layer_by_layer(pair, tmp_path):
    source = tmp_path / "source"
    load_model(pair[0], dtype="bfloat16").save_pretrained(source)
    load_tokenizer(pair[0]).save_pretrained(source)
    report = anymla.tune(pair[1], tmp_path / "out", teacher=source, **TINY | {"tokens": 256, "layerwise": 0.5})
    assert report.steps > 1


@pytest.mark.slow
def test_the_gap_closes_on_the_bundled_model(converted_folder, tmp_path):
    seen = []
    settings = TINY | {"length": 128, "tokens": 12_800, "batch": 2, "eval_every": 100, "eval_tokens": 2048}
    settings |= {"train": "attention", "layerwise": 0.1}
    report = anymla.tune(converted_folder, tmp_path / "out", teacher=BUNDLED, progress=seen.append, **settings)
    assert report.gap_closed > 0.1
    assert report.after.kl < 0.9 * report.before.kl
    assert (report.tokens, report.steps, len(seen)) == (12_800, 50, 50)
    scores = anymla.evaluate(tmp_path / "out", VALID, against=BUNDLED, tokens=2048, length=128)
    assert scores.perplexity == pytest.approx(report.after.perplexity, rel=1e-4)
    assert scores.kl == pytest.approx(report.after.kl, rel=1e-3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in converted_folder.iterdir()} | {
        "tuning.json",
        "tuning.yaml",
        "metrics.jsonl",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (converted_folder, tmp_path / "out")
    )
    assert before == after
    check_page(tmp_path / "out" / "report.html", report.to_dict())
    assert "## Tuned" in (tmp_path / "out" / "README.md").read_text()
    assert Tune.of(read_tune(tmp_path / "out" / "tuning.yaml")) == report.tuning
    old, new = (load_file(folder / "model.safetensors") for folder in (converted_folder, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(".self_attn." in name for name in changed)


def test_layerwise_loss_is_zero_at_full_budget(tmp_path):
    source = make_model("qwen3", torch.float64, head_dim=8)
    anymla.convert(save_model(source, tmp_path / "source"), tmp_path / "whole", kv_cache=1.0, **FAST)
    whole = load_model(tmp_path / "whole")
    always_expand(whole)
    pairs, ids = AttentionPairs(source, whole, attention_names(whole)), token_ids()
    with pairs.hooked(), torch.no_grad():
        logits(source, ids)
        logits(whole, ids)
    assert len(pairs.targets) == 2
    assert layer_loss(pairs.outputs, pairs.targets, torch.ones(ids.shape)) < 1e-12
    pairs.outputs = {name: 0 * output for name, output in pairs.outputs.items()}
    assert layer_loss(pairs.outputs, pairs.targets, torch.ones(ids.shape)) == pytest.approx(1)


def test_layers_learn_apart_from_each_other(pair):
    source, converted = (load_model(folder) for folder in pair)
    choose_learning(converted, "attention")
    pairs, ids = AttentionPairs(source, converted, attention_names(converted)), token_ids()
    with pairs.hooked():
        logits(source, ids)
        logits_behind = converted(input_ids=ids, use_cache=False).logits
    assert not logits_behind.requires_grad
    pairs.outputs[attention_names(converted)[1]].sum().backward()
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is not None) == name.startswith("model.layers.1.self_attn.")


@pytest.mark.parametrize("expanded", [False, True])
def test_packed_documents_do_not_see_each_other(pair, expanded):
    model = load_model(pair[1], dtype="float64")
    if expanded:
        always_expand(model)
    documents = [token_ids(1, length)[0].tolist() for length in (9, 14, 17)]
    rows = packed_rows(documents, 40, [])
    packed = model(**{name: torch.tensor(value) for name, value in rows.items()}, use_cache=False).logits[0]
    start = 0
    for document in documents:
        alone = logits(model, torch.tensor([document]))[0]
        assert torch.allclose(packed[start : start + len(document)], alone, atol=1e-10)
        start += len(document)
    check_packing(model)


def test_what_is_not_installed_is_named(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"package datasets: pip install 'anymla\[tune\]'"):
        anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], **TINY)
    assert not list(tmp_path.iterdir())


def test_a_model_that_mixes_packed_documents_is_refused(monkeypatch):
    model = make_model("llama")
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, position_ids=None, **inputs: forward(self, **inputs))
    with pytest.raises(RecipeError, match="--no-packing"):
        check_packing(model)


def test_losses():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64).unbind()
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    assert token_kl(ours, theirs, 1.0, None).mean() == pytest.approx(expected.item(), rel=1e-5)
    assert token_kl(theirs, theirs, 2.0, 3).abs().max() < 1e-6
    learned = ours.clone().requires_grad_()
    plain_kl = (theirs / 2).softmax(-1) * ((theirs / 2).log_softmax(-1) - (learned / 2).log_softmax(-1)) * 4
    both = plain_kl.sum(), token_kl(learned, theirs, 2.0, None).sum()
    torch.testing.assert_close(*(torch.autograd.grad(each, learned)[0] for each in both), rtol=1e-5, atol=1e-6)
    few = token_kl(ours, theirs, 1.0, 3).mean()
    assert 0 < few < expected
    ids = torch.randint(7, (2, 5), generator=generator)
    plain = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert token_loss(ours[:, :-1], ids[:, 1:]).mean() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("size", [5, 3, 1])
def test_losses_in_parts(size, monkeypatch):
    """Mean over rows of weighted means; a row that does not count is a row of zeros."""
    monkeypatch.setattr("anymla.evaluation.logits.MOST", size * 3)
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = (values[0].mean() + values[1, :2].mean()) / 3
    counted = shares(weight)
    logits = Logits.of(values[..., None])
    assert len(list(logits.parts())) == -(-5 // size)
    found = sum_of_parts(lambda given, part: (given.at(part)[..., 0] * counted[:, part]).sum(), logits, [])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(each, values)[0] for each in (expected, found)]
    torch.testing.assert_close(*gradients)


def test_merged_adapters_give_the_same_logits(pair, tmp_path):
    tuning = Tune(train="lora", lora_rank=4)
    base = load_model(pair[1], dtype="float32")
    always_expand(base)
    adapted = with_adapters(base, tuning)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter)
    assert any("kv_b_proj.lora_A" in name for name, _ in adapted.named_parameters())
    save_tuned(pair[1], adapted.state_dict(), tuning, tmp_path / "merged", last=True)
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), token_ids()
    assert torch.allclose(logits(merged.eval(), ids), logits(adapted.eval(), ids), atol=2e-3, rtol=1e-4)
    assert not torch.allclose(logits(merged, ids), logits(load_model(pair[1]), ids), atol=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "lora", "lora_rank": 2, "gradient_checkpointing": True, "layerwise": 0.5},
        {
            "train": "all",
            "cross_entropy": 0.5,
            "top_k": 20,
            "temperature": 2.0,
            "packing": False,
            "layerwise": 0.0,
            "seed": 1,
        },
        {
            "train": "norms",
            "precision": "bfloat16",
            "learning_rate": 0.003,
            "early_stop": 4,
            "eval_every": 1,
            "save_every": 3,
        },
    ],
    ids=["lora", "all", "norms"],
)
def test_every_way_to_learn(pair, tmp_path, settings):
    source, converted = pair
    anymla.tune(converted, tmp_path / "out", teacher=source, **TINY | {"tokens": 512, "batch": 2} | settings)
    old, new = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert {tensor.dtype for tensor in new.values()} == {tensor.dtype for tensor in old.values()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("self_attn" in name for name in changed)
    assert any("norm" in name for name in changed) == (settings["train"] in ("all", "norms"))
    assert any("mlp" in name for name in changed) == (settings["train"] == "all")


def test_a_step_is_shared_out():
    stages = make_stages(Tune(batch=12, micro_batch=4, layerwise=0.25), 64_000, 64, 2)
    assert [(stage.name, stage.steps) for stage in stages] == [("layerwise", 21), ("logits", 62)]
    assert {(stage.micro, stage.accumulation, stage.step_tokens) for stage in stages} == {(3, 2, 768)}


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_have_settings_to_tune_with(name):
    assert Tune.of(read_tune(name)) == read_recipe(name).steps[1]


def test_a_recipe_file_holds_settings_or_steps(tmp_path):
    flat, steps, other = (tmp_path / f"{name}.yaml" for name in ("flat", "steps", "other"))
    flat.write_text("tokens: 512\n")
    steps.write_text("steps:\n- mla: {kv_cache: 0.5}\n- tune: {tokens: 512}\n")
    other.write_text("steps: [mla]\n")
    assert read_tune(flat) == read_tune(steps) == {"tokens": 512}
    assert read_mla(steps) == {"kv_cache": 0.5}
    with pytest.raises(RecipeError, match="no step tune"):
        read_tune(other)


TUNE = "tune {tmp}/converted --teacher {model} -o {out} --data {train} --tokens 512 --length 32 --eval-tokens 256"
BAD = [
    Case("no-data", TUNE.replace("--data {train}", ""), ("--data", "missing")),
    Case("data-missing", f"{TUNE} --data {{tmp}}/no.txt", ("no.txt", "not a readable file")),
    Case("data-share", f"{TUNE} --data {{train}}@0", ("@0", "above 0")),
    Case("data-short", f"{TUNE} --eval-tokens 900000", ("--eval-tokens", "tokens")),
    Case("not-converted", TUNE.replace("{tmp}/converted", "{model}"), ("not converted by anymla",)),
    Case("teacher-missing", TUNE.replace("--teacher {model}", "--teacher {tmp}/no"), ("{tmp}/no",)),
    Case("teacher-converted", TUNE.replace("--teacher {model}", "--teacher {tmp}/converted"), ("--teacher",)),
    Case("output-is-source", TUNE.replace("{out}", "{tmp}/converted"), ("source checkpoint", "-o")),
    Case("recipe-unknown", f"{TUNE} --recipe nothing", ("nothing", "paper")),
    Case("recipe-typo", f"{TUNE} --recipe {{tmp}}/typo.yaml", ("typo.yaml", "tokenz")),
    Case("train-unknown", f"{TUNE} --train heads", ("--train", "'heads'")),
    Case("learning-rate", f"{TUNE} --learning-rate -1", ("learning-rate", "greater than 0")),
    Case("report-to-unknown", f"{TUNE} --report-to paper", ("--report-to paper", "tensorboard")),
    Case("device-unknown", f"{TUNE} --device nonsense", ("--device nonsense",)),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_bad_input_is_one_line_and_nothing_is_written(case, converted_folder, tmp_path, monkeypatch, capfd):
    arguments = case.prepare(tmp_path)
    (tmp_path / "converted").symlink_to(converted_folder)
    (tmp_path / "typo.yaml").write_text("tokenz: 5\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1), run.err
    assert run.err.startswith("error: ")
    assert case.missing_words(tmp_path, run.err) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_out_of_memory_names_what_takes_less(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")

    monkeypatch.setattr("anymla.training.trainer.token_kl", full)
    with pytest.raises(RecipeError, match=r"--micro-batch 2 or --length 64.*--gradient-checkpointing.*--train lora"):
        anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], tokens=512, batch=2, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_json_summary_and_tensorboard(pair, tmp_path, monkeypatch, capfd):
    arguments = ["tune", str(pair[1]), "--teacher", str(pair[0]), "-o", str(tmp_path / "out"), "--tokens", "512"]
    options = [
        "--data",
        str(TRAIN),
        "--length",
        "32",
        "--eval-tokens",
        "256",
        "--learning-rate",
        "0.001",
        "--json",
        "--report-to",
        "tensorboard",
    ]
    run = run_main([*arguments, *options], monkeypatch, capfd)
    assert (run.code, run.err) == (0, "")
    report = json.loads(run.out)
    assert {"before", "after", "gap_closed", "tokens", "seconds", "original_perplexity"} <= report.keys()
    assert list((tmp_path / "out" / "runs").glob("events*"))


def test_a_rate_that_does_harm_changes_nothing(pair, tmp_path, monkeypatch, capfd):
    command = ["tune", pair[1], "--teacher", pair[0], "-o", tmp_path / "out", "--data", TRAIN, "--eval-data", VALID]
    command += ["--length", 64, "--tokens", 256, "--eval-tokens", 256, "--device", "cpu", "--learning-rate", 0.5]
    done = run_main([str(word) for word in command], monkeypatch, capfd)
    assert done.code == 0 and "nothing was better than the model as it came" in done.err, done
    report = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert report["before"] == report["after"] and report["gap_closed"] == 0.0
    old, new = (load_file(folder / "model.safetensors") for folder in (pair[1], tmp_path / "out"))
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("train", ["attention", "all", "lora"])
@pytest.mark.parametrize("settings", [{}, {"cross_entropy": 0.5, "top_k": 7, "temperature": 2.0}], ids=str)
def test_logits_in_parts_train_alike(pair, tmp_path, monkeypatch, train, settings):
    """The same model comes out, whether the logits of a row are made at once or a few at a time."""
    made = {}
    for most in (1 << 24, 512 * 2 * 5):
        monkeypatch.setattr("anymla.evaluation.logits.MOST", most)
        options = TINY | {"tokens": 512, "batch": 2, "learning_rate": 1e-4, "train": train} | settings
        report = anymla.tune(pair[1], tmp_path / str(most), teacher=pair[0], **options)
        made[most] = report, load_file(tmp_path / str(most) / "model.safetensors")
    (whole, expected), (parts, found) = made.values()
    assert (parts.before.kl, parts.after.kl) == pytest.approx((whole.before.kl, whole.after.kl), rel=1e-5)
    for name, tensor in expected.items():
        assert (found[name].double() - tensor.double()).norm() <= 1e-4 * tensor.double().norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_gradients_of_logits_in_parts(family, monkeypatch):
    """Through the head and all below it, equal to those of whole logits; also of soft-capped and scaled heads."""
    model = tiny_model(family, tie_word_embeddings=True).requires_grad_(True)
    monkeypatch.setattr("anymla.evaluation.logits.MOST", 512 * 2 * 5)
    ids, counted = token_ids(2, 24), shares(torch.ones(2, 24))
    reference = torch.randn(2, 24, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(given, part):
        return (token_kl(given, reference[:, part], 1.0, None) * counted[:, part]).sum()

    whole = value(model(input_ids=ids, use_cache=False).logits, slice(0, 24))
    weights = list(model.parameters())
    expected = torch.autograd.grad(whole, weights)
    parts = at_head(
        model,
        model,
        {"input_ids": ids},
        lambda logits: sum_of_parts(lambda logits, part: value(logits.at(part), part), logits, weights),
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(parts, weights), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


def test_the_page_is_there_before_the_output_is(pair, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="no space left"):
        patched.setattr("anymla.report.page.Page.write", full)
        anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], tokens=256, **TINY)
    assert not (tmp_path / "out").exists()
    anymla.tune(pair[1], tmp_path / "out", teacher=pair[0], tokens=256, **TINY)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"anymla chat {tmp_path / 'out'} " in page and ".partial" not in page


def test_curves_without_what_cannot_be_drawn():
    """A loss of 0 has no place on a logarithmic scale, and a curve of such alone none on the page."""
    scores = {"eval_kl": -1e-9, "eval_perplexity": 8.0, "original_perplexity": 8.0}
    lines = [{"stage": "layerwise", "tokens": 64, "loss": 0.0}, {"stage": "logits", "tokens": 128, "loss": 0.0}]
    lines += [{"stage": "logits", "tokens": 192, "loss": 0.5}, {"stage": "logits", "tokens": 192} | scores]
    loss, perplexity = _curves(lines)
    assert [(each.name, each.points) for each in loss.series] == [("logits", ((192.0, 0.5),))]
    assert loss.lines and perplexity.lines
    assert [chart.title for chart in _curves([line for line in lines if line.get("loss") != 0.5])] == [perplexity.title]

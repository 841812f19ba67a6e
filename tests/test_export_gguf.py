"""anymla export --to gguf from end to end, where llama.cpp is not installed; tests/engines has the rest."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch

import anymla
from anymla.demo import bundled_model
from anymla.errors import ParityError, RecipeError, UnsupportedModelError
from anymla.exports.gguf import llama_cpp
from tests.damage import run_main
from tests.families import FAST


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch):
    monkeypatch.setattr(llama_cpp, "llama_python", lambda: None)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The bundled model, converted under the limits of GGUF."""
    folder = tmp_path_factory.mktemp("planned") / "model"
    anymla.convert(bundled_model(), folder, kv_cache=0.5, target="gguf", **FAST)
    return folder


def test_the_folder_holds_file_card_and_records(planned, tmp_path):
    done = anymla.export(planned, tmp_path / "out", "gguf")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "README.md", "export.json", "conversion.json", "recipe.yaml", "plan.yaml"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {each.tensor_type.name for each in reader.tensors}
    assert kinds == {"F32"}  # the dtype of the bundled model
    assert (done.parity.engine, done.parity.engine_failed) == ("transformers", None)
    assert done.parity.not_run.startswith("llama.cpp was not run (llama-cpp-python is not installed)")
    assert done.parity.tokens == done.parity.of
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == done.to_dict()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "\nllama-server -m ./model.gguf\nllama-cli -m ./model.gguf\n" in card
    assert "llama.cpp was not run" in card
    assert "import anymla" not in card  # how the converted model is used
    assert f"{done.parity.of} of {done.parity.of} greedy tokens equal" in card


def test_the_check_is_of_the_weights_in_the_file(planned, tmp_path):
    """What rounding to the file's type does shows in the figure, in the order of the types."""
    found = {}
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        done = anymla.export(planned, tmp_path / dtype, "gguf", dtype=dtype)
        found[dtype] = done.parity.difference
        assert done.parity.tolerance == llama_cpp.TOLERANCE[dtype]
        assert f"--to gguf -o {dtype} --dtype {dtype}\n" in (tmp_path / dtype / "README.md").read_text()
    assert found["f32"] < 1e-4 < found["f16"] < found["bf16"] and found["q8_0"] > found["f16"]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_that_holds_something_else_is_refused(planned, tmp_path, monkeypatch, dtype):
    """One number, wrong by 2 %."""
    from anymla.exports.gguf import writer as room

    encode = room._encoded

    def damaged(weight, kind):
        if weight.name != "blk.2.ffn_up.weight":
            return encode(weight, kind)
        numbers = weight.read().float().clone()
        place = divmod(int(numbers.abs().argmax()), numbers.shape[1])
        numbers[place] *= 1.02
        return encode(room.Weight(weight.name, weight.shape, lambda: numbers), kind)

    monkeypatch.setattr(room, "_encoded", damaged)
    with pytest.raises(ParityError, match=r"blk.2.ffn_up.weight in model.gguf is not what was to be written"):
        anymla.export(planned, tmp_path / "out", "gguf", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "name"), [("deepseek", "e"), ("gguf", "model"), ("vllm", "vllm")])
def test_cards_hold_whole_commands_and_no_paths(planned, tmp_path, target, name):
    pad = None if target == "gguf" else "none"
    done = anymla.export(planned, tmp_path / name, target, pad=pad)
    card = (tmp_path / name / "README.md").read_text()
    place = "." if target == "gguf" else "THIS_FOLDER"
    commands = [command.replace(str(tmp_path / name), place) for command in done.commands.values()]
    assert "```sh\n" + "\n".join(commands) + "\n```" in card
    again = f"anymla export model --to {target} -o {name} --dtype {done.dtype}{'' if pad is None else ' --pad none'}"
    assert f"\n{again}\n" in card
    assert f"anymla {anymla.__version__}, torch {torch.__version__}, transformers " in card
    assert str(tmp_path) not in card and "/stories260K" not in card
    report = json.loads((tmp_path / name / "export.json").read_text())
    assert (report["dtype"], report["pad"]) == ("f32" if target == "gguf" else "float32", pad or "none")
    assert report["versions"]["torch"] == torch.__version__


def test_an_earlier_export_is_replaced_when_asked(planned, tmp_path):
    anymla.export(planned, tmp_path / "out", "gguf", dtype="f16")
    with pytest.raises(anymla.errors.OutputError, match="exists"):
        anymla.export(planned, tmp_path / "out", "gguf", dtype="q8_0")
    before = (tmp_path / "out" / "model.gguf").stat().st_size
    done = anymla.export(planned, tmp_path / "out", "gguf", dtype="q8_0", overwrite=True)
    assert done.commands["llama.cpp"].endswith("/model.gguf --no-repack")
    assert (tmp_path / "out" / "model.gguf").stat().st_size < before


def test_refused_exports_leave_nothing(converted_folder, planned, tmp_path):
    with pytest.raises(UnsupportedModelError, match="--target deepseek"):
        anymla.export(converted_folder, tmp_path / "out", "gguf")  # planned without a target
    (tmp_path / "words").mkdir()
    shutil.copytree(planned, tmp_path / "words", dirs_exist_ok=True)
    spec = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedModelError, match="Lowercase"):
        anymla.export(tmp_path / "words", tmp_path / "out", "gguf")
    with pytest.raises(RecipeError, match="q4_0"):
        anymla.export(planned, tmp_path / "out", "gguf", dtype="q4_0")
    with pytest.raises(RecipeError, match="--pad"):
        anymla.export(planned, tmp_path / "out", "gguf", pad="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["words"]


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [("normalizer", {"type": "Lowercase"}, "Lowercase"), ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace")],
)
def test_the_tokenizer_is_asked_about_before_weights_are_read(tmp_path, monkeypatch, part, value, word):
    """Another target takes the same model."""
    from anymla.data import text

    source = tmp_path / "source"
    shutil.copytree(bundled_model(), source)
    spec = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(spec | {part: value}))
    monkeypatch.setattr(text, "calibration_windows", lambda *_, **__: pytest.fail("asked too late"))
    with pytest.raises(UnsupportedModelError, match=f"--target gguf cannot hold the tokenizer of .*{word}"):
        anymla.convert(source, tmp_path / "out", kv_cache=0.5, target="gguf", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    anymla.convert(source, tmp_path / "out", kv_cache=0.5, target="deepseek", **FAST)


def test_command_line_and_push(planned, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    run = run_main(["export", str(planned), "--to", "gguf", "-o", str(out), "--dtype", "bf16"], monkeypatch, capfd)
    assert run.code == 0
    assert f"llama-server -m {out}/model.gguf" in run.out and f"llama-cli -m {out}/model.gguf" in run.out
    run = run_main(["push", str(out), "somebody/small", "--dry-run", "--json"], monkeypatch, capfd)
    pushed = json.loads(run.out)
    assert pushed["url"] is None and pushed["files"]["model.gguf"] == (out / "model.gguf").stat().st_size
    assert "## Files" in (out / "README.md").read_text()


def test_a_deepseek_export_carries_a_card(planned, tmp_path):
    anymla.push(planned, "somebody/converted", dry_run=True)
    done = anymla.export(planned, tmp_path / "out", "deepseek")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "api_server --model THIS_FOLDER" in card and "import anymla" not in card
    assert "## Files" not in card  # those of the converted model
    assert f"{done.parity.cached_numbers:g} numbers per token and layer" in card
    anymla.push(tmp_path / "out", "somebody/served", dry_run=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "api_server --model THIS_FOLDER" in card and card.count("## Files") == 1


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("anymla.exports.gguf.writer.find_spec", lambda name: None)
    monkeypatch.setattr("anymla.exports.deepseek.writer.write_deepseek", lambda *args, **options: pytest.fail("begun"))
    with pytest.raises(RecipeError, match=r"pip install 'anymla\[gguf\]'"):
        anymla.export(bundled_model(), tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())

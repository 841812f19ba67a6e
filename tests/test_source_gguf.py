"""GGUF files as sources: what transformers reads from them, bit for bit, one layer at a time."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import _type_traits
from transformers import AutoModelForCausalLM, AutoTokenizer

import anymla
from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from tests.families import FAST, logits, token_ids
from tests.gguf_files import Kind, write_gguf_model
from tests.tokenizers import KINDS as TOKENIZERS
from tests.tokenizers import LINES, TEMPLATE, byte_level

KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KINDS |= {kind.name: "bfloat16" for kind in _type_traits if kind.name not in KINDS}  # all that gguf de-quantises


def as_transformers_reads(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def assert_same(file, dtype):
    expected = as_transformers_reads(file).state_dict()
    with plain_source(locate(file)) as plain:
        got, info = AutoModelForCausalLM.from_pretrained(plain.folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert got.config.dtype == getattr(torch, dtype)
    assert not plain.folder.exists()
    got = got.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_tensor(tmp_path, kind):
    write_gguf_model(tmp_path / "model.gguf", Kind[kind])
    assert_same(tmp_path / "model.gguf", KINDS[kind])
    assert f"{kind}" in anymla.inspect(tmp_path / "model.gguf").notes[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_hidden_layers": 3, "num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"num_hidden_layers": 2, "head_dim": 128}),
    ],
)
def test_families(tmp_path, family, changes):
    model = write_gguf_model(tmp_path / "model.gguf", Kind.F32, family, **changes)
    assert_same(tmp_path / "model.gguf", "float32")
    with plain_source(locate(tmp_path)) as plain:
        got = AutoModelForCausalLM.from_pretrained(plain.folder)
    assert torch.allclose(logits(got, token_ids()), logits(model, token_ids()), atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_convert_end_to_end(tmp_path, kind):
    (tmp_path / "download").mkdir()
    file = tmp_path / "download" / "model.gguf"
    write_gguf_model(file, Kind[kind], num_hidden_layers=2)
    given = file if kind == "Q8_0" else file.parent
    report = anymla.convert(given, tmp_path / "out", kv_cache=1.0, dtype="float32", **FAST)
    assert report.plan.model == str(given)
    assert str(given) in (tmp_path / "out" / "plan.yaml").read_text()
    assert "source-" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm]*"))
    assert f"{kind}, " in report.notes[0] or f"{kind} tensors" in report.notes[0]
    assert report.notes[0] in (tmp_path / "out" / "README.md").read_text()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    half = torch.float16 if kind == "F16" else torch.bfloat16
    expected = as_transformers_reads(file)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(half).float()
    assert torch.allclose(logits(got, token_ids()), logits(expected, token_ids()), atol=5e-3)
    theirs, ours = byte_level("smollm"), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Once upon a time 4567 cats, naïve <tool> it's\n"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == TEMPLATE
    assert ours.eos_token == theirs.eos_token
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == theirs.eos_token_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "out"]


def test_a_conversion_that_was_stopped_goes_on(tmp_path):
    write_gguf_model(tmp_path / "model.gguf", Kind.Q4_K, num_hidden_layers=3)

    class Stop(Exception):
        pass

    def stop(done, total, result):
        if done == 2:
            raise Stop

    settings = FAST | {"kv_cache": 0.5}
    anymla.convert(tmp_path / "model.gguf", tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        anymla.convert(tmp_path / "model.gguf", tmp_path / "out", progress=stop, **settings)
    abandoned = tmp_path / ".out.source-1"  # as a process leaves it that was killed
    abandoned.mkdir()
    done = []
    anymla.convert(tmp_path / "model.gguf", tmp_path / "out", progress=lambda *args: done.append(args[0]), **settings)
    assert done == [2, 3]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out", "whole"]


def test_plan_eval_and_generate_take_one(tmp_path, capsys, monkeypatch):
    from anymla.cli import main

    file = tmp_path / "model.gguf"
    write_gguf_model(file, Kind.Q5_K, num_hidden_layers=2)
    planned = anymla.plan(file, kv_cache=0.5, **FAST)
    assert planned.model == str(file)
    assert anymla.explain_plan(planned)["layers"]
    anymla.convert(file, tmp_path / "out", planned)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 60)
    scores = anymla.evaluate(tmp_path / "out", text, against=file, tokens=256, length=64)
    assert scores.kl > 0
    monkeypatch.setattr("sys.argv", ["anymla", "generate", str(file), "--prompt", "Once", "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "note: the tensors of model.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_the_tokenizer_splits_as_the_file_says(tmp_path, kind):
    write_gguf_model(tmp_path / "model.gguf", Kind.F32, splits=kind)
    with plain_source(locate(tmp_path)) as plain:
        got = AutoTokenizer.from_pretrained(plain.folder)
    expected = byte_level(kind)
    for text in (*dict.fromkeys(LINES), "a  4 567  words<tool><|end|> it'LL", "   x\n\n\n y\t12345"):
        assert got(text).input_ids == expected(text).input_ids, text
        assert got.decode(got(text).input_ids) == expected.decode(expected(text).input_ids)


def llama3_factors(dim, theta, factor):
    """As llama.cpp's converter computes them."""
    factors = []
    for index in range(0, dim, 2):
        length = 2 * np.pi * theta ** (index / dim)
        if length < 8192 / 4:
            factors.append(1)
        elif length > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_kept(tmp_path, factor):
    factors = llama3_factors(64, 10000.0, factor)
    write_gguf_model(tmp_path / "model.gguf", Kind.F32, extra={"rope_freqs.weight": factors})
    with plain_source(locate(tmp_path)) as plain:
        got = AutoModelForCausalLM.from_pretrained(plain.folder)
    assert got.config.rope_parameters["factor"] == factor
    plain_frequencies = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(got.model.rotary_emb.inv_freq * torch.tensor(factors), plain_frequencies, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_other_rope_scalings(tmp_path, keys, expected):
    write_gguf_model(tmp_path / "model.gguf", Kind.F32, keys=keys)
    with plain_source(locate(tmp_path)) as plain:
        config = json.loads((plain.folder / "config.json").read_text())
    assert expected.items() <= config["rope_parameters"].items()


def test_what_transformers_would_drop_is_refused(tmp_path):
    write_gguf_model(tmp_path / "bias.gguf", Kind.F32, extra={"blk.0.attn_q.bias": np.zeros(256, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"no place for its tensor 'blk\.0\.attn_q\.bias'"):
        anymla.convert(tmp_path / "bias.gguf", tmp_path / "out", **FAST)
    for name, extra, keys in (
        ("factors.gguf", {"rope_freqs.weight": np.full(32, 3, np.float32)}, {}),
        ("scaling.gguf", {}, {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}),
    ):
        write_gguf_model(tmp_path / name, Kind.F32, extra=extra, keys=keys)
        with pytest.raises(UnsupportedModelError, match="rope"):
            anymla.convert(tmp_path / name, tmp_path / "out", **FAST)
    assert not any(path.name.startswith(".") or path.name == "out" for path in tmp_path.iterdir())


def test_files_that_are_no_source_are_named(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write_gguf_model(file, Kind.F32)
    shutil.copyfile(file, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: name one of them \(model\.gguf, other\.gguf\)"):
        anymla.inspect(tmp_path)
    part = tmp_path / "model-00001-of-00003.gguf"
    shutil.copyfile(file, part)
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        anymla.inspect(part)
    (tmp_path / "other.gguf").write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated or not a GGUF"):
        anymla.inspect(tmp_path / "other.gguf")
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(CheckpointError, match="not a folder"):
        anymla.inspect(tmp_path / "text.txt")
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "unheard-of")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "architecture unheard-of" in anymla.inspect(tmp_path / "new.gguf").reason
    monkeypatch.setattr("anymla.io.sources.gguf.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'anymla\[gguf\]'"):
        anymla.inspect(file)


def test_a_folder_with_other_files_beside_its_gguf(tmp_path):
    write_gguf_model(tmp_path / "model.gguf", Kind.Q8_0)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as some uploads have it
    assert anymla.inspect(tmp_path).supported
    assert locate(tmp_path).gguf is not None


def test_compared(tmp_path):
    """Files alone, whose context is read from them."""
    files = [tmp_path / f"{name}.gguf" for name in ("first", "second")]
    for file, kind in zip(files, (Kind.F32, Kind.Q8_0), strict=True):
        write_gguf_model(file, kind, max_position_embeddings=48)
    (tmp_path / "text.txt").write_text("\n".join(LINES) * 20)
    told = anymla.compare(files, tmp_path / "text.txt", tokens=288)
    assert (told.settings["length"], told.settings["context"]) == (48, 48)
    assert [each.name for each in told.models] == [str(file) for file in files]

"""Checkpoints as they lie on disks: indices, folders below, tensors that nothing uses, and what is no checkpoint."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import anymla
from anymla.errors import AnymlaError, CheckpointError, UnsupportedModelError
from anymla.io.checkpoint import load_model
from tests.damage import run_main
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.test_ties import WEIGHTS, fields, stored, with_head

FULL = FAST | {"kv_cache": 1.0}
INDEX = "model.safetensors.index.json"
OPTIONS = "--kv-cache 1 --calibration-tokens 1024 --calibration-length 64 --reconstruction-steps 2"


@pytest.fixture
def source(tmp_path):
    """A tied Llama of two layers in one file."""
    return save_model(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path / "source")


def sharded(folder, names, **extra):
    """Spreads the tensors of ``folder`` over files of these names, with an index that names ``extra`` as well."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {}
    for number, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[number :: len(names)]}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index | extra}))
    return folder


def check_same(source, out):
    """A conversion at full budget that gives the logits of what stock transformers loads; returns the report."""
    report = anymla.convert(source, out, **FULL)
    stock, converted = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, out))
    assert (logits(converted, token_ids()) - logits(stock, token_ids())).abs().max() < 1e-3
    assert (logits(load_model(source), token_ids()) - logits(stock, token_ids())).abs().max() == 0
    return report


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["model-00001-of-00001.safetensors"],
        ["weights/model-00001-of-00002.safetensors", "weights/model-00002-of-00002.safetensors"],
        ["deep/er/a.safetensors", "b.safetensors"],
        ["./a.safetensors"],
    ],
)
def test_where_shards_may_lie(source, tmp_path, names):
    assert check_same(sharded(source, names), tmp_path / "out").notes == ()


@pytest.mark.parametrize("head", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_index_may_name_what_is_tied_to_what_a_shard_holds(source, tmp_path, head):
    if head != "lm_head.weight":
        stored(source, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(head)}))
    assert (
        check_same(
            sharded(source, ["a.safetensors", "b.safetensors"], **{head: "a.safetensors"}), tmp_path / "out"
        ).notes
        == ()
    )


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "x"])
def test_an_index_may_name_nothing_else_that_no_shard_holds(source, tmp_path, name):
    fields(source, tie_word_embeddings=False)
    with_head(source, "different")
    sharded(source, ["a.safetensors"])
    kept = load_file(source / "a.safetensors")
    kept.pop(name, None)
    save_file(kept, source / "a.safetensors", metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: "a.safetensors"}}))
    for run in (lambda: anymla.convert(source, tmp_path / "out", **FULL), lambda: load_model(source)):
        with pytest.raises(CheckpointError, match=name):
            run()


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "weights/../../a.safetensors", "/tmp/a.safetensors", "C:\\a", "~/a"]
)
def test_shards_outside_the_folder(source, tmp_path, name):
    sharded(source, ["a.safetensors"], x=name)
    shutil.copy(source / "a.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="names a file outside the folder"):
        anymla.convert(source, tmp_path / "out", **FULL)


def test_a_linked_folder_leads_outside(source, tmp_path):
    sharded(source, ["weights/a.safetensors"])
    shutil.move(source / "weights", tmp_path / "elsewhere")
    (source / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"names a file outside the folder: 'weights/a.safetensors' is in a linked"
    ):
        anymla.convert(source, tmp_path / "out", **FULL)


def test_a_missing_shard_below_the_folder_is_missing(source, tmp_path):
    sharded(source, ["weights/a.safetensors"])
    (source / "weights" / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard 'weights/a.safetensors' that"):
        anymla.convert(source, tmp_path / "out", **FULL)


LAYER = "model.layers.{}."
EXTRA = {
    "scales of the cache": ["model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"],
    "scales in the projections": [
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.v_proj.output_scale",
    ],
    "rope frequencies": [f"{LAYER.format(layer)}self_attn.rotary_emb.inv_freq" for layer in (0, 1)],
    "a last layer that predicts further tokens": [
        f"{LAYER.format(2)}{name}.weight"
        for name in ("eh_proj", "enorm", "hnorm", "self_attn.q_proj", "mlp.experts.3.up_proj", "shared_head.norm")
    ],
    "layers that predict further tokens": ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"],
    "the same inside the model": ["model.mtp_layers.0.input_layernorm.weight"],
    "a head of another task": ["score.weight"],
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_nothing_uses_are_left_out_with_a_note(source, tmp_path, kind, monkeypatch, capfd):
    names = sorted(EXTRA[kind])
    stored(source, lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    (note,) = check_same(source, tmp_path / "out").notes
    assert names[0] in note
    assert "left out" in note
    assert len(names) == 1 or note.startswith(f"{len(names)} tensors")
    assert not set(names) & set(load_file(tmp_path / "out" / WEIGHTS))
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"] == [note]
    assert note in (tmp_path / "out" / "README.md").read_text()
    run = run_main(["convert", str(source), "-o", str(tmp_path / "again"), *OPTIONS.split()], monkeypatch, capfd)
    assert f"note: {note}\n" in run.err


def test_a_declared_number_of_further_layers(source, tmp_path):
    fields(source, num_nextn_predict_layers=1)
    stored(source, lambda tensors: tensors.update({f"{LAYER.format(2)}mlp.up_proj.weight": torch.ones(3)}))
    assert LAYER.format(2) in check_same(source, tmp_path / "out").notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.eh_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.3.self_attn.v_proj.weight",
    ],
)
def test_tensors_of_another_model_are_refused(source, tmp_path, name):
    stored(source, lambda tensors: tensors.update({name: torch.ones(3)}))
    for run in (lambda: anymla.convert(source, tmp_path / "out", **FULL), lambda: load_model(source)):
        with pytest.raises(CheckpointError, match=f"no place for: {name}"):
            run()


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
def test_an_index_without_metadata(source, tmp_path, metadata):
    """Conversion does not need it; transformers' own loading does."""
    sharded(source, ["a.safetensors"])
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]} | metadata))
    anymla.convert(source, tmp_path / "out", **FULL)
    with pytest.raises(CheckpointError, match=r"index\.json has no metadata, which transformers asks for"):
        load_model(source)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1081999\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "git-lfs pointer, not the file itself: run `git lfs pull`"),
        (PAGE, "HTML page"),
        ("", "an empty file"),
        (b"PK\x03\x04archive/data.pkl", "a zip file, as torch.save writes"),
        (b"\x80\x04\x95.", "a pickle"),
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "a.safetensors"])
def test_another_file_in_the_place_of_one(source, tmp_path, name, content, words):
    if name == "a.safetensors":
        sharded(source, [name])
    (source / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=rf"{name}.* it is .*{words}") as error:
        anymla.convert(source, tmp_path / "out", **FULL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_for_the_tokenizer(source, tmp_path, name):
    (source / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"tokenizer cannot be loaded: {name} is a git-lfs pointer"):
        anymla.convert(source, tmp_path / "out", **FULL)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"", "is a file of weights only, not a folder"),
        ("pytorch_model.bin", b"PK\x03\x04", "pickled weights, which anymla does not open, not a folder"),
        ("model.zip", b"PK\x03\x04", "an archive, not a folder: unpack it"),
        ("model.tar.gz", b"\x1f\x8b", "an archive, not a folder: unpack it"),
        ("config.json", b"{}", "is one file of a checkpoint, not a folder: give the folder"),
        ("model", b"text", "is a file, not a folder"),
    ],
)
def test_a_file_for_a_folder(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for run in (anymla.inspect, anymla.plan, lambda path: anymla.convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=words):
            run(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "the folder is empty"),
        (["model_index.json"], "a diffusers pipeline"),
        (["modules.json"], "a sentence-transformers model"),
        (["params.json", "consolidated.00.pth"], "layout of its makers"),
        (["deeper/config.json"], "but deeper in it does: give .*source/deeper"),
        (["README.md"], "MODEL must be a Hugging Face checkpoint folder"),
    ],
)
def test_a_folder_without_a_config(tmp_path, files, words):
    (tmp_path / "source").mkdir()
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"has no config.json.*{words}"):
        anymla.convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}, "a part of a diffusers pipeline"),
        ({"peft_type": "LORA", "base_model_name_or_path": "org/name"}, "a PEFT adapter"),
        ({"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}, "a sentence-transformers module"),
        ({"architecture": "vit", "pretrained_cfg": {}}, "a timm model"),
    ],
)
def test_the_config_of_something_else(source, tmp_path, config, words):
    (source / "config.json").write_text(json.dumps(config))
    reason = anymla.inspect(source).reason
    assert reason is not None
    assert words in reason
    with pytest.raises(UnsupportedModelError, match=words):
        anymla.convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=words):
        load_model(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "a.safetensors", INDEX])
def test_a_link_to_nothing(source, tmp_path, name):
    """A blob that the hub's cache has lost."""
    if name in ("a.safetensors", INDEX):
        sharded(source, ["a.safetensors"])
    (source / name).unlink()
    (source / name).symlink_to("../../blobs/4d7a2146")
    with pytest.raises(CheckpointError, match=r"link to \.\./\.\./blobs/4d7a2146, which is not there"):
        anymla.convert(source, tmp_path / "out")


def test_a_link_to_nothing_for_a_folder(tmp_path):
    (tmp_path / "source").symlink_to("gone")
    with pytest.raises(CheckpointError, match="source is a link to gone, which is not there"):
        anymla.convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_permission_denied(source, tmp_path, monkeypatch, name):
    if name == INDEX:
        sharded(source, ["a.safetensors"])
    opened, path_opened = builtins.open, Path.open

    def refusing(real):
        def locked(path, *arguments, **options):
            if Path(str(path)).name == name:
                raise PermissionError(13, os.strerror(13), str(path))
            return real(path, *arguments, **options)

        return locked

    monkeypatch.setattr(builtins, "open", refusing(opened))
    monkeypatch.setattr(Path, "open", refusing(path_opened))
    with pytest.raises(AnymlaError, match=rf"{name} cannot be read: Permission denied"):
        anymla.convert(source, tmp_path / "out", **FULL)


def test_a_folder_that_nobody_may_look_into(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()

    def locked(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "listdir", locked)
    with pytest.raises(CheckpointError, match="source cannot be read: Permission denied"):
        anymla.convert(tmp_path / "source", tmp_path / "out")


def test_float8_without_a_word_in_the_config(source, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    stored(source, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=f"{name} is of dtype F8_E4M3.* quantization_config"):
        anymla.convert(source, tmp_path / "out", **FULL)

"""Quantised checkpoints as sources: each layout is de-quantised to the numbers that it stands for."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
)

import anymla
from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from tests import quantisers
from tests.families import FAST, logits, make_model, save_model, token_ids

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
CT = {"quant_method": "compressed-tensors", "config_groups": GROUPS}
PACKED = CT | {"format": "pack-quantized"}
MODELOPT = {"quant_method": "modelopt"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
CASES = {
    "fp8-blocks": (quantisers.fp8_blocks(16, 32), FP8, "FP8"),
    "fp8-uneven-blocks": (quantisers.fp8_blocks(40, 40), FP8 | {"weight_block_size": [40, 40]}, "FP8"),
    "fp8-bfloat16-scales": (quantisers.fp8_blocks(16, 32, torch.bfloat16), FP8, "FP8"),
    "fp8-exponent-scales": (quantisers.fp8_blocks(16, 32, torch.float8_e8m0fnu), FP8, "FP8"),
    "fp8-tensor": (quantisers.fp8_rows("tensor"), {"quant_method": "fp8", "activation_scheme": "static"}, "FP8"),
    "fbgemm": (quantisers.fp8_rows("rows"), {"quant_method": "fbgemm_fp8"}, "FP8"),
    "ct-fp8-rows": (quantisers.fp8_rows("rows"), CT | {"format": "float-quantized"}, "compressed-tensors (FP8)"),
    "ct-fp8-flat": (quantisers.fp8_rows("flat rows"), CT | {"format": "naive-quantized"}, "compressed-tensors (FP8 or"),
    "ct-int8": (quantisers.int8_rows, CT | {"format": "int-quantized"}, "compressed-tensors (INT8)"),
    "ct-int4": (quantisers.packed_integers(4, 16), PACKED, "compressed-tensors (packed"),
    "ct-int4-zeros": (quantisers.packed_integers(4, 32, zero=True), PACKED, "compressed"),
    "ct-int8-packed": (quantisers.packed_integers(8, 16), PACKED, "compressed-tensors"),
    "ct-int4-order": (
        quantisers.packed_integers(4, 16, shuffled=True),
        PACKED,
        "compressed",
    ),
    "ct-nvfp4": (quantisers.nvfp4("ct"), CT | {"format": "nvfp4-pack-quantized"}, "compressed-tensors (NVFP4)"),
    "ct-mxfp4": (quantisers.packed_mxfp4, CT | {"format": "mxfp4-pack-quantized"}, "compressed-tensors (MXFP4)"),
    "ct-mxfp8": (quantisers.mxfp8, CT | {"format": "mxfp8-quantized"}, "compressed-tensors (MXFP8)"),
    "modelopt-fp8": (
        quantisers.fp8_rows("tensor"),
        MODELOPT | {"quant_algo": "FP8"},
        "ModelOpt (FP8)",
    ),
    "modelopt-nvfp4": (
        quantisers.nvfp4("modelopt"),
        MODELOPT | {"quantization": {"quant_algo": "NVFP4"}},
        "ModelOpt (NVFP4)",
    ),
    "gptq-4": (quantisers.gptq(4, 16), {"quant_method": "gptq", "bits": 4}, "GPTQ (4 bits)"),
    "gptq-4-order": (quantisers.gptq(4, 32, shuffled=True), {"quant_method": "gptq", "bits": 4}, "GPTQ (4 bits)"),
    "gptq-8": (quantisers.gptq(8, 32), {"quant_method": "gptq", "bits": 8}, "GPTQ (8 bits)"),
    "gptq-3": (quantisers.gptq(3, 32), {"quant_method": "gptq", "bits": 3}, "GPTQ (3 bits)"),
    "gptq-2": (quantisers.gptq(2, 16, indexed=False), {"quant_method": "gptq", "bits": 2}, "GPTQ (2 bits)"),
    "gptq-v2": (
        quantisers.gptq(4, 16, plus=0),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        "GPTQ (4 bits)",
    ),
    "awq": (quantisers.awq(16), {"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ (4 bits)"),
}


def tiny(folder, dtype=torch.bfloat16, **changes):
    return save_model(make_model("llama", dtype, **SHAPE | changes), folder)


def plain_tensors(folder):
    with plain_source(locate(folder)) as plain:
        config = json.loads((plain.folder / "config.json").read_text())
        assert "quantization_config" not in config
        _, info = AutoModelForCausalLM.from_pretrained(plain.folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return {name: tensor for file in plain.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", list(CASES))
def test_a_layout_is_dequantised_to_the_numbers_it_stands_for(tmp_path, case):
    quantise, settings, label = CASES[case]
    meant = quantisers.store(tiny(tmp_path / "model"), quantise, settings)
    got = plain_tensors(tmp_path / "model")
    assert got.keys() == meant.keys()
    for name, tensor in meant.items():
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], tensor.bfloat16()), name
    notes = anymla.inspect(tmp_path / "model").notes
    assert notes[0].startswith(label) and notes[0].endswith("weights are de-quantised to bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_that_of_the_config(tmp_path, dtype):
    meant = quantisers.store(tiny(tmp_path / "model", getattr(torch, dtype)), quantisers.fp8_rows("rows"), FP8)
    got = plain_tensors(tmp_path / "model")
    assert all(torch.equal(got[name], tensor.to(getattr(torch, dtype))) for name, tensor in meant.items())


def assert_loads_as(folder, expected):
    with plain_source(locate(folder)) as plain:
        got = AutoModelForCausalLM.from_pretrained(plain.folder).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name


@pytest.mark.skipif(transformers.__version__ < "5.17", reason="its own loader of FP8 fails without a GPU")
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_fp8_as_transformers_loads_it(tmp_path, scale):
    quantisers.store(tiny(tmp_path / "model"), quantisers.fp8_blocks(16, 32, scale), FP8)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.bfloat16)
    assert_loads_as(tmp_path / "model", theirs.state_dict())


def gpt_oss(folder):
    """A tiny gpt-oss as it is shipped: experts in MXFP4."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **SHAPE | {"intermediate_size": 64, "vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 256},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    save_model(GptOssForCausalLM(config).to(torch.bfloat16), folder)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], _ = quantisers.mxfp4(tensor.float().mT)
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return folder


def test_gpt_oss_as_transformers_loads_it(tmp_path):
    folder = gpt_oss(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert_loads_as(folder, theirs.state_dict())
    report = anymla.convert(folder, tmp_path / "out", kv_cache=1.0, **FAST)
    assert report.notes == ("MXFP4 weights are de-quantised to bfloat16",)
    assert report.after.kl < 1e-3


BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


@pytest.mark.parametrize("case", list(BITSANDBYTES))
def test_bitsandbytes_as_it_dequantises_itself(tmp_path, case):
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(**BITSANDBYTES[case])
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "base", **shape), quantization_config=settings)
    save_model(model, tmp_path / "model")
    expected = model.dequantize(dtype=torch.bfloat16).state_dict()
    got = plain_tensors(tmp_path / "model")
    for name, tensor in got.items():
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-6), name


def test_convert_of_fp8_end_to_end(tmp_path):
    meant = quantisers.store(tiny(tmp_path / "model"), quantisers.fp8_blocks(16, 32), FP8)
    report = anymla.convert(tmp_path / "model", tmp_path / "out", kv_cache=1.0, **FAST)
    assert report.notes == ("FP8 weights are de-quantised to bfloat16",)
    assert report.notes[0] in (tmp_path / "out" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    original = make_model("llama", torch.float32, **SHAPE)
    original.load_state_dict({name: tensor.bfloat16().float() for name, tensor in meant.items()})
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = token_ids()
    assert (logits(got, ids) - logits(original, ids)).abs().max() < 0.05 * logits(original, ids).abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        },
        MODELOPT | {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        MODELOPT | {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
    ],
)
def test_a_quantised_cache_is_no_quantised_weight(tmp_path, settings):
    folder = tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    scales = {f"model.layers.{layer}.self_attn.{name}_scale": torch.ones(1) for layer in (0, 1) for name in "kv"}
    save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    assert anymla.inspect(folder).supported
    got = plain_tensors(folder)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    report = anymla.convert(folder, tmp_path / "out", kv_cache=1.0, **FAST)
    assert "its weights are not quantised" in report.notes[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "hqq"}, "by hqq"),
        ({"quant_method": "quanto"}, "by quanto"),
        ({"quant_method": "torchao"}, "by torchao"),
        ({"quant_method": "bitnet"}, "by bitnet"),
        ({}, "unknown"),
        ({"quant_method": "awq", "version": "gemv"}, "layout 'gemv'"),
        (CT | {"format": "marlin-24"}, "as 'marlin-24'"),
        (CT | {"format": "float-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (MODELOPT | {"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'"),
    ],
)
def test_what_is_not_dequantised_is_refused_before_weights_are_read(tmp_path, settings, says):
    folder = tiny(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings or {"bits": 4}}))
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert says in anymla.inspect(folder).reason
    with pytest.raises(UnsupportedModelError, match=f"{says}.*give the unquantised checkpoint"):
        anymla.convert(folder, tmp_path / "out", **FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("lost", ["weight_scale_inv", "shape"])
def test_scales_that_are_missing_or_do_not_fit_are_named(tmp_path, lost):
    folder = tiny(tmp_path / "model")
    quantisers.store(folder, quantisers.fp8_blocks(16, 32), FP8)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    if lost == "shape":
        tensors[name] = torch.ones(7, 2)
    else:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        anymla.convert(folder, tmp_path / "out", **FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

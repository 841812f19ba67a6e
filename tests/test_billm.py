"""BiLLM: what is packed is what was meant, in the bytes that are counted; every part of it earns its bits."""

from __future__ import annotations

import json

import pytest
import torch

import anymla
from anymla.architectures.model_spec import read_config, spec_of
from anymla.errors import AnymlaError
from anymla.exports.converted import read_converted
from anymla.io.safetensors import read_header
from anymla.methods.billm import BiLLM
from anymla.methods.billm.binarise import binarised, magnitudes, threshold
from anymla.methods.billm.build import packed_linear
from anymla.modeling.packed_linear import PackedLinear, pack_bits, unpack_bits
from anymla.modeling.packed_spec import PackedSpec
from anymla.modeling.spec import LayerSpec
from tests.families import FAST, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.method_contract import load, logits

TEXT = {"calibration_tokens": 1024, "calibration_length": 64}
LEVELS = ("own", "centred", "symmetric")
HALF = {"mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 0}}


def problem(out=48, into=200, seed=0):
    """A matrix and the Hessian of correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix, weight = (torch.randn(rows, into, generator=generator, dtype=torch.float64) for rows in (into, out))
    inputs = torch.randn(1024, into, generator=generator, dtype=torch.float64) @ mix
    inputs = inputs * torch.rand(into, generator=generator, dtype=torch.float64).mul(3).exp()
    return weight, inputs.T @ inputs


def lost(values, weight, hessian):
    """The share of the output's square that is lost."""
    error = values - weight
    return ((error @ hessian * error).sum() / (weight @ hessian * weight).sum()).item()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model in 16 bits, whose tensors are large beside the names of them."""
    model = make_model("llama", torch.bfloat16, hidden_size=96, intermediate_size=232, vocab_size=4096)
    return save_model(model, tmp_path_factory.mktemp("billm") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The same with packed weights, some of them kept."""
    folder = tmp_path_factory.mktemp("billm") / "packed"
    anymla.run(source, folder, steps=[{"billm": {"block_size": 32, "keep": ["*.v_proj", "mlp.up*"], **TEXT}}])
    return folder


@pytest.mark.parametrize("levels", ["own", "symmetric"])
@pytest.mark.parametrize("group", [1, 2])
def test_weights_of_two_levels_come_back(levels, group):
    """Exactly, whatever block or row; with two sizes, too, where no column is salient.

    Not with centred levels: the mean of a row with more weights above than below is not between its levels.
    """
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (6, 4, 16), generator=generator) * 2.0 - 1
    sizes = torch.rand(6, 4, 1, generator=generator).double() + 1
    means = torch.rand(6, 4, 1, generator=generator).double() if levels == "own" and group == 1 else 0.0
    far = (torch.randint(2, (6, 4, 16), generator=generator) * 2.0) if group == 2 else 0.0
    weight = (signs * (sizes + far) + means).flatten(1)
    settings = BiLLM(block_size=16, levels=levels, most_salient=49 if group == 1 else 0)
    found = binarised(weight, torch.eye(64, dtype=torch.float64), settings, torch.float64)
    assert torch.allclose(found.values, weight, atol=1e-12)


@pytest.mark.parametrize("into", [8, 64, 75])
def test_packing_is_exact(into):
    bits = torch.rand(3, 5, into, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, -(-into // 8))
    assert torch.equal(unpack_bits(packed)[..., :into].bool(), bits)


@pytest.mark.parametrize(("into", "block", "levels"), [(200, 32, "own"), (75, 16, "symmetric"), (64, 128, "centred")])
def test_a_packed_linear_multiplies_by_what_was_found(into, block, levels, monkeypatch):
    weight, hessian = problem(into=into)
    original = torch.nn.Linear(into, len(weight), dtype=torch.float64)
    found = binarised(weight, hessian, BiLLM(block_size=block, levels=levels), torch.float32)
    spec = PackedSpec(block_size=block, means=levels != "symmetric", linears={"x": (len(weight), into)})
    linear = packed_linear(found, spec, original)
    assert torch.equal(linear.weight, found.values)
    monkeypatch.setattr("anymla.modeling.packed_linear.CHUNK", 7 * into)  # several chunks, the last one smaller
    inputs = torch.randn(2, 3, into, dtype=torch.float64)
    assert torch.allclose(linear(inputs), inputs @ found.values.T + original.bias)
    held = sum(tensor.nbytes for name, tensor in linear.state_dict().items() if name != "bias")
    assert held == spec.size(8)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_threshold_is_the_best_of_its_candidates(levels):
    values = torch.randn(9, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.2
    settings = BiLLM(block_size=40, levels=levels, most_salient=0)

    def left(bound):
        total = 0.0
        for group in (values.abs() < bound, values.abs() >= bound):
            for row, inside in zip(values, group, strict=True):
                part = row[inside]
                mean = part.mean() if len(part) and levels != "symmetric" else 0.0
                above = part >= mean
                rebuilt = mean + torch.where(above, 1.0, -1.0) * (part - mean).abs().mean()
                if levels == "own":
                    rebuilt = torch.where(above, part[above].mean(), part[~above].mean())
                total += (part - rebuilt).square().sum().item() if len(part) else 0.0
        return total

    assert threshold(values, levels) == min(magnitudes(values), key=left)
    whole = binarised(values, torch.eye(40, dtype=torch.float64), settings, torch.float64).values
    assert (whole - values).square().sum().item() == pytest.approx(left(threshold(values, levels)))


@pytest.mark.parametrize("seed", range(3))
def test_each_part_earns_its_place(seed):
    weight, hessian = problem(seed=seed)

    def loss(**settings):
        values = binarised(weight, hessian, BiLLM(block_size=64, **settings), torch.float64).values
        return lost(values, weight, hessian)

    plain = {"split": False, "most_salient": 0, "compensation": "none"}
    row_signs = lost(weight.abs().mean(1, keepdim=True) * weight.sign(), weight, hessian)
    order = [loss(), loss(split=False), loss(**plain), row_signs]
    assert order == sorted(order) and order[0] < 0.9 * order[1]
    assert loss() < loss(compensation="columns") < loss(compensation="none")
    assert loss(search_on="saliency") < loss(**plain)
    errors = {}
    for levels in LEVELS:  # of the weights themselves
        settings = BiLLM(block_size=64, levels=levels, compensation="none")
        errors[levels] = (binarised(weight, hessian, settings, torch.float64).values - weight).square().sum().item()
    assert errors["own"] < errors["centred"] and errors["own"] < errors["symmetric"]


def test_counted_bits_are_those_of_the_files(packed):
    spec, files = spec_of(read_config(packed)), sorted(packed.glob("*.safetensors"))
    stored = {name: tensor.size for file in files for name, tensor in read_header(file).items()}
    told = json.loads((packed / "account.json").read_text())["weight_bytes"]
    assert sum(stored.values()) == told
    assert told <= sum(file.stat().st_size for file in files) < 1.01 * told
    held = [layer.packed for layer in spec.layers]
    planes = [size for name, size in stored.items() if name.split(".")[-1] in ("signs", "second", "salient", "scales")]
    assert sum(planes) == sum(each.size(2) for each in held)
    step = json.loads((packed / "run.json").read_text())["steps"][0]["account"]
    assert step["bits_per_weight"] == 8 * sum(planes) / sum(each.weights for each in held)


def test_what_is_kept_stays(source, packed):
    before, after = load(source), load(packed)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        assert isinstance(new.self_attn.q_proj, PackedLinear) and isinstance(new.mlp.down_proj, PackedLinear)
        for kept in ("self_attn.v_proj", "mlp.up_proj", "input_layernorm"):
            assert torch.equal(new.get_submodule(kept).weight, old.get_submodule(kept).weight)


@torch.no_grad()
def test_it_loads_without_anymla(packed, without_anymla):
    ids = token_ids()
    found = without_anymla.logits(packed, {"input_ids": ids})
    assert torch.equal(found, load(packed)(input_ids=ids).logits)
    assert {"packed_linear.py", "packed_spec.py"} <= {path.name for path in packed.iterdir()}


def test_the_extreme_recipe(tmp_path):
    """mla, billm, then codes: projections of the cache stay whole, the others packed, and the cache is coded."""
    steps = [HALF, {"billm": {"block_size": 32, **TEXT}}, {"transform_coding": {"kv_cache": 0.125, **TEXT}}]
    source = save_model(make_model("llama", torch.float32, hidden_size=96, intermediate_size=232), tmp_path / "source")
    done = anymla.run(source, tmp_path / "out", steps=steps)
    model, ids = load(tmp_path / "out"), token_ids(1, 24)
    attention = model.model.layers[0].self_attn
    assert type(attention).__name__ == "CodedLatentAttention"
    assert all(isinstance(part, PackedLinear) for part in (attention.q_proj, attention.o_proj))
    assert all(type(part) is torch.nn.Linear for part in (attention.kv_a_proj_with_mqa, attention.kv_b_proj))
    account = json.loads((tmp_path / "out" / "account.json").read_text())
    assert account["weight_bytes"] == account["measured"]["weight_bytes"] < 0.8 * done.original.account.weight_bytes
    assert done.steps[2].account.bits_per_weight == done.steps[1].account.bits_per_weight
    made = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    whole = logits(model, made.sequences[:, :-1])
    assert torch.equal(whole[:, 23:].argmax(-1), made.sequences[:, 24:])


def test_what_cannot_follow_is_refused_before_weights_are_read(packed, source, tmp_path):
    (config := tmp_path / "config-only").mkdir()
    (config / "config.json").write_text((packed / "config.json").read_text())
    refused = {
        "mla": "its weights are packed: put mla before the step that packs them",
        "billm": "its weights are packed already",
        "transform_coding": "the projections of its attention are packed",
        "kvquant": "the projections of its attention are packed",
    }
    for step, reason in refused.items():
        with pytest.raises(AnymlaError, match=reason):
            anymla.run(config, tmp_path / "out", steps=[step])
    with pytest.raises(AnymlaError, match="its weights are packed already"):
        anymla.convert(config, tmp_path / "out")
    with pytest.raises(AnymlaError, match="packed weights, which do not learn"):
        anymla.tune(packed, tmp_path / "out", teacher=source, data=str(source / "tokenizer.json"))
    with pytest.raises(AnymlaError, match="its weights are packed, which transformers alone reads"):
        read_converted(packed)
    with pytest.raises(AnymlaError, match="its experts lie in one tensor"):
        anymla.run(
            save_model(tiny_model("mixtral", torch.float32), tmp_path / "moe"), tmp_path / "out", steps=["billm"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "bamba"])
def test_other_kinds_of_linears(family, tmp_path):
    """Transposed ones, and those of layers without softmax attention: the original with the unpacked weights."""
    folder = save_model(tiny_model(family, torch.float32), tmp_path / "source")
    anymla.run(folder, tmp_path / "out", steps=[{"billm": {"block_size": 16, **TEXT}}])
    found, expected, count = load(tmp_path / "out"), load(folder), 0
    for name, module in found.named_modules():
        if isinstance(module, PackedLinear):
            dense, count = expected.get_submodule(name), count + 1
            dense.weight.data = module.weight.T if type(dense).__name__ == "Conv1D" else module.weight
    assert count >= 8 and torch.allclose(logits(found, token_ids()), logits(expected, token_ids()), atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 12, "block_size 12 is no multiple of 8"),
        ("linears", {"mlp.up_proj": [3]}, "linears must give two sizes"),
        ("more", 1, "PackedSpec has no field more"),
    ],
)
def test_a_broken_description_is_refused_in_one_line(field, value, message):
    described = LayerSpec(packed=PackedSpec(block_size=32, linears={"x": (4, 8)})).to_dict()
    assert LayerSpec.of(json.loads(json.dumps(described))).to_dict() == described
    described["packed"][field] = value
    with pytest.raises(ValueError, match=message):
        LayerSpec.of(described)

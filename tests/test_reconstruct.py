"""Gradient steps per layer: they pay on the trained model, touch nothing that is whole, and are the same everywhere."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import anymla
from anymla.architectures.model_spec import read_model_spec
from anymla.demo import bundled_model
from anymla.errors import RecipeError
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.effort import EFFORTS
from anymla.methods.mla import choose
from anymla.methods.mla.costs import reconstruction_steps
from anymla.methods.mla.reconstruct import Reconstruction
from anymla.model_run.activations import Activations, Budget
from tests.families import FAST, make_model, save_model

SETTINGS = {"calibration_tokens": 8192, "calibration_length": 128}


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_steps_pay_on_text_that_they_did_not_see(tmp_path):
    kl = []
    for steps in (0, 30):
        report = anymla.convert(
            bundled_model(), tmp_path / str(steps), kv_cache=0.125, reconstruction_steps=steps, **SETTINGS
        )
        kl.append(report.after.kl)
    assert kl[1] < 0.95 * kl[0]


@pytest.mark.slow
def test_candidates_are_judged_by_what_steps_make_of_them(tmp_path, monkeypatch):
    kl, settings = [], SETTINGS | {"kv_cache": 0.125, "reconstruction_steps": 100}
    for trial in (4, 1000):
        monkeypatch.setattr(choose, "TRIAL", trial)  # 1000: none, and the channels of most worth
        kl.append(anymla.convert(bundled_model(), tmp_path / str(trial), **settings).after.kl)
    assert kl[0] < 0.95 * kl[1]


def test_a_layer_that_lost_nothing_stays_as_it_is(tmp_path):
    source = save_model(make_model("qwen3"), tmp_path / "source")
    for steps in (0, 3):
        anymla.convert(source, tmp_path / str(steps), kv_cache=1.0, **FAST | {"reconstruction_steps": steps})
    before, after = weights(tmp_path / "0"), weights(tmp_path / "3")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_dtype_stays_and_all_tensors_of_the_attention_move(tmp_path):
    for steps in (0, 25):
        settings = {"kv_cache": 0.25, "rope_dims": 6, "reconstruction_steps": steps, "dtype": "bfloat16"}
        anymla.convert(bundled_model(), tmp_path / str(steps), calibration_tokens=4096, **settings)
    before, after = weights(tmp_path / "0"), weights(tmp_path / "25")
    assert all(after[name].dtype == before[name].dtype for name in before)
    moved = {name.rpartition("self_attn.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"q_proj.weight", "kv_b_proj.weight", "o_proj.weight", "query_rotation", "channel_weight"} <= moved
    assert not any("mlp" in name or "embed" in name for name in moved)


def test_published_methods_take_no_steps(tmp_path):
    source = save_model(make_model("llama"), tmp_path / "source")
    for steps in (0, 3):
        settings = FAST | {"reconstruction_steps": steps, "factorization": "joint-svd"}
        anymla.convert(source, tmp_path / str(steps), kv_cache=0.5, **settings)
    before, after = weights(tmp_path / "0"), weights(tmp_path / "3")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("layers", "hidden", "steps"),
    [
        (5, 64, 300),
        (10, 512, 155),  # with trials three times as many
        (30, 512, 99),  # without
        (32, 4096, 99),
        (80, 8192, 99),
    ],
)
def test_default_steps_are_decided_by_the_model_alone(layers, hidden, steps):
    heads = {"num_attention_heads": 8, "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": 512}
    model_spec = read_model_spec(LlamaConfig(**heads).to_dict())
    for device in ("auto", "cpu", "cuda"):
        assert reconstruction_steps(model_spec, anymla.MLA(device=device)) == steps
        assert reconstruction_steps(model_spec, anymla.MLA(device=device, reconstruction_steps=7)) == 7


def room(values, tmp_path):
    activations = Activations(values.shape, values.dtype, "cpu", Budget(1 << 30, tmp_path))
    activations[:] = values
    return activations


def test_processes_share_the_windows_of_each_step(tmp_path, monkeypatch):
    """What two processes draw together is what one draws alone."""
    attention = torch.nn.Linear(4, 4)
    attention.query_rotation = attention.channel_weight = torch.zeros(0)
    drawn = {}
    for world in (1, 2):
        for rank in range(world):
            values = torch.zeros(12 // world, 512, 4)
            monkeypatch.setattr("anymla.methods.mla.reconstruct.world", lambda world=world: world)
            monkeypatch.setattr("anymla.methods.mla.reconstruct.rank", lambda rank=rank: rank)
            monkeypatch.setattr("anymla.methods.mla.reconstruct.all_sum_number", lambda *_: 12)
            steps = Reconstruction(attention, room(values, tmp_path), room(values, tmp_path), {}, 1, torch.float32)
            batches = steps._batches(slice(0, 12 // world), seed=3)
            drawn[world, rank] = [[window * world + rank for window in next(batches)] for _ in range(9)]
    together = [sorted(a + b) for a, b in zip(drawn[2, 0], drawn[2, 1])]
    assert together == [sorted(step) for step in drawn[1, 0]]
    assert {window for step in together for window in step} == set(range(12))


def test_effort_sets_tokens_and_steps_where_they_are_not_given():
    quick, own = anymla.MLA(effort="quick"), anymla.MLA(effort="quick", calibration_tokens=1024)
    assert (quick.calibration_tokens, quick.reconstruction_steps) == (8192, 20)
    assert (own.calibration_tokens, own.reconstruction_steps) == (1024, 20)
    default = anymla.MLA()
    assert (default.effort, default.calibration_tokens, default.reconstruction_steps) == ("default", 32768, None)
    best = anymla.plan(bundled_model(), quick, effort="best").recipe  # what an effort set, another may change
    assert (best.calibration_tokens, best.reconstruction_steps) == (65536, 300)
    codes = {effort: TransformCoding(effort=effort).calibration_tokens for effort in EFFORTS["transform_coding"]}
    assert codes == {"quick": 4096, "default": 16384, "best": 65536}
    assert TransformCoding(effort="best", calibration_tokens=1024).calibration_tokens == 1024
    assert anymla.MLA.model_validate(quick.model_dump()) == quick
    with pytest.raises(RecipeError, match=r"effort: .*'quick', 'default' or 'best'"):
        anymla.MLA.of({"effort": "much"})

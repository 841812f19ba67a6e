"""Tuning with a coded cache in the forward pass: levels stay, what is around them learns."""

import json

import pytest
import torch
from safetensors.torch import load_file

import anymla
from anymla.architectures.model_spec import read_config, spec_of
from tests.families import FAST, make_model, save_model
from tests.test_methods import FAST_RUN, TINY

CODES = {"transform_coding": {"kv_cache": 0.0625, **FAST_RUN}}
LATENT = {"mla": {"kv_cache": 0.5, **FAST, "reconstruction_steps": 0}}
STEPS = {"keys and values": [CODES], "latent": [LATENT, CODES], "kvquant": [{"kvquant": {"bits": 2, **FAST_RUN}}]}


@pytest.mark.parametrize("kind", STEPS)
def test_weights_around_the_codes_learn(kind, tmp_path):
    source, learn = save_model(make_model("llama", torch.float32), tmp_path / "source"), {"learning_rate": 0.001}
    steps = [*STEPS[kind], {"tune": TINY | learn}]
    anymla.run(source, tmp_path / "out", steps=steps, keep_steps=True)
    before = next((tmp_path / "out-steps").glob(f"step-{len(steps) - 1}-*"))
    assert spec_of(read_config(before)) == (tuned := spec_of(read_config(tmp_path / "out")))
    assert all(layer.coded.rounds for layer in tuned.layers)
    old, new = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert not any("codec" in name for name in changed)
    assert any("self_attn" in name for name in changed)
    report = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert report["after"]["kl"] < report["before"]["kl"]

"""KVQuant on a trained model: every part of it loses less, in every family, at the bytes that it says."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.cache_coding.kvquant import KVQuant
from anymla.methods.cache_coding.nuq import fitted_tables, predicted_loss
from anymla.methods.cache_coding.survey import KeyValueSurvey
from anymla.methods.cache_coding.tables import fit_tables
from anymla.model_run.stream import decoder_layers
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import Coding
from tests.families import make_model, save_model, token_ids
from tests.surveys import in_memory, surveyed

FIRST = 4
FAST = {"calibration_tokens": 2048, "calibration_length": 64}


def windows(split, tokens):
    return calibration_windows(bundled_text(split), load_tokenizer(bundled_model()), tokens=tokens, length=128, seed=0)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the survey says of the bundled model."""
    output = tmp_path_factory.mktemp("facts") / "out"
    return in_memory(surveyed(KeyValueSurvey(FIRST), bundled_model(), windows("train", 8192), output))


@pytest.fixture(scope="module")
def lost(original, facts):
    """The KL that codecs lose on held-out text: ``lost(make, first)`` with ``make(fact, kind)`` a layer's codec."""
    ids = windows("valid", 1024)

    @torch.no_grad()
    def logits():
        return original(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    expected = logits()

    def kl(make, first=FIRST):
        hooks = []
        for layer, fact in zip(decoder_layers(original), facts):
            for kind, name in (("key", "k_proj"), ("value", "v_proj")):
                codec = make(fact, kind)

                def code(module, args, output, codec=codec):
                    return torch.cat([output[:, :first], codec(output[:, first:])], 1)

                hooks.append(getattr(layer.self_attn, name).register_forward_hook(code))
        found = logits()
        for hook in hooks:
            hook.remove()
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    return kl


def uniform(bits, *, per_token):
    """Equal steps, between the ends of each token, or for keys of each channel."""

    def make(fact, kind):
        sample, grid = fact[f"{kind}_sample"], torch.linspace(-1, 1, 2**bits)
        codec = make_codec(Coding(bits=((bits, sample.shape[1]),), token_scale=per_token or kind == "value"))
        low, high = sample.aminmax(dim=0)
        ends = (high + low)[:, None] / 2 + (high - low)[:, None] / 2 * grid
        codec.set_tables({bits: grid.expand(len(low), -1) if codec.coding.token_scale else ends})
        return codec

    return make


def non_uniform(bits):
    """Levels of each channel's own, of keys and values, and nothing else."""

    def make(fact, kind):
        sample = fact[f"{kind}_sample"]
        codec = make_codec(Coding(bits=((bits, sample.shape[1]),)))
        codec.set_tables(fit_tables(sample, codec.coding))
        return codec

    return make


def kvquant(bits, **settings):
    """As the method codes it."""
    method = KVQuant(bits=bits, **settings)

    def make(fact, kind):
        coding = method.coding(fact[f"{kind}_sample"].shape[1], per_token=kind == "value")
        codec = make_codec(coding)
        codec.set_tables(fitted_tables(fact, kind, coding, method))
        return codec

    return make


def test_every_part_loses_less_at_2_bits(lost):
    parts = [uniform(2, per_token=True), uniform(2, per_token=False), kvquant(2, sparse=0), kvquant(2)]
    found = [lost(part) for part in parts]
    assert all(after < before for before, after in pairwise(found)), found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_outliers_and_first_tokens_lose_less_than_levels_alone(bits, lost):
    found = lost(kvquant(bits)), lost(non_uniform(bits), first=0)
    assert found[0] < 0.9 * found[1], found


def test_the_predicted_loss_is_near_the_true_one(lost, facts):
    method, predicted = KVQuant(bits=3), 0.0
    for kind in ("key", "value"):
        coding = method.coding(32, per_token=kind == "value")
        predicted += sum(
            predicted_loss(fact, kind, coding, fitted_tables(fact, kind, coding, method)) for fact in facts
        )
    assert predicted == pytest.approx(lost(kvquant(3)), rel=0.3)


def test_q_norm_keeps_mean_and_deviation(facts):
    states = facts[0]["key_sample"]
    found = {q_norm: kvquant(2, q_norm=q_norm)(facts[0], "key")(states) for q_norm in (True, False)}
    moments = [torch.stack([each.mean(), each.std()]) for each in (states, found[True], found[False])]
    assert (moments[1] - moments[0]).norm() < (moments[2] - moments[0]).norm()
    assert KVQuant(bits=2).moves_levels and not KVQuant(bits=3).moves_levels


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_a_model_is_coded_and_generates(family, tmp_path):
    """From a run to batches that are padded on the left: what a sequence gives does not depend on its neighbours."""
    source = save_model(make_model(family, torch.float32), tmp_path / "source")
    done = anymla.run(source, tmp_path / "out", steps=[{"kvquant": {"bits": 4, **FAST}}])
    assert [step.name for step in done.steps] == ["kvquant"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == f"anymla_{family}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = token_ids(1, 12)
    padded, mask = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    batch = torch.cat([token_ids(1, 17), padded]), torch.cat([torch.ones(1, 17, dtype=torch.long), mask])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    alone = model.generate(ids, **options)[0, 12:]
    together = model.generate(batch[0], attention_mask=batch[1], **options)[1, 17:]
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"bits": 7}, "bits"),
        ({}, {"sparse": 0.5}, "sparse"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, {}, "dynamic"),
    ],
)
def test_refusals_are_one_line(changes, settings, message, tmp_path):
    source = save_model(make_model("llama", torch.float32, **changes), tmp_path / "source")
    with pytest.raises(AnymlaError, match=message) as caught:
        anymla.run(source, tmp_path / "out", steps=[{"kvquant": settings}])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

"""Codes of a latent: what they lose, two routes through the same codes, exact bases, and codes turned off."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.exports.converted import read_converted
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.cache_coding.kvquant import KVQuant
from anymla.methods.cache_coding.nuq import fitted_tables
from anymla.methods.cache_coding.survey import KeyValueSurvey
from anymla.model_run.stream import decoder_layers
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import Coding
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.spec import LayerSpec, layers_of
from tests.coded_models import coded_latent, coded_model
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.precision import Exact
from tests.surveys import in_memory, surveyed

FIRST = 4
FAST = {"calibration_tokens": 2048, "calibration_length": 64}
MLA = {"mla": {"kv_cache": 0.5, "reconstruction_steps": 0, **FAST}}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def windows(split, tokens):
    return calibration_windows(bundled_text(split), load_tokenizer(bundled_model()), tokens=tokens, length=128, seed=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bundled model with a latent, and what the survey says of it."""
    folder = tmp_path_factory.mktemp("trained")
    anymla.run(bundled_model(), folder / "mla", steps=[MLA])
    survey = surveyed(KeyValueSurvey(FIRST), folder / "mla", windows("train", 8192), folder / "facts")
    return load(folder / "mla"), in_memory(survey)


@pytest.fixture(scope="module")
def lost(trained):
    """The KL that codecs of latent and rope key lose beyond the latent itself, on held-out text."""
    model, facts = trained
    ids = windows("valid", 1024)
    expected = logits(model, ids).log_softmax(-1)

    def kl(make):
        hooks = []
        for layer, fact in zip(decoder_layers(model), facts):
            codecs = [make(fact, kind) for kind in ("key", "value")]

            def code(module, args, output, codecs=codecs):
                parts = output.split([codec.width for codec in codecs], -1)
                coded = torch.cat([codec(part) for codec, part in zip(codecs, parts)], -1)
                return torch.cat([output[:, :FIRST], coded[:, FIRST:]], 1)

            hooks.append(layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(code))
        found = logits(model, ids).log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    return kl


def kvquant(bits, *, per_token=False, **settings):
    method = KVQuant(bits=bits, **settings)

    def make(fact, kind):
        coding = method.coding(fact[f"{kind}_sample"].shape[1], per_token=per_token)
        codec = make_codec(coding)
        codec.set_tables(fitted_tables(fact, kind, coding, method))
        return codec

    return make


def grid(kind, bits):
    def make(fact, side):
        return make_codec(Coding(bits=((bits, fact[f"{side}_sample"].shape[1]),), kind=kind, block=32))

    return make


def test_more_bits_lose_less(lost):
    found = [lost(kvquant(bits)) for bits in (2, 3, 4, 5, 6, 8)]
    assert all(after < before / 2 for before, after in pairwise(found)), found


def test_levels_per_channel_lose_less_than_per_token(lost):
    assert lost(kvquant(3)) < lost(kvquant(3, per_token=True))
    assert lost(kvquant(4)) < lost(grid("int", 4))
    assert lost(grid("int", 8)) < lost(grid("fp8", 8)) < lost(grid("int", 4))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mpt"])  # mpt: no rope, so no rope key
def test_two_routes_through_the_same_codes_agree(family, tmp_path):
    """A latent model in the same basis, whose latent and rope key go through the codecs as they are made."""
    source, steps = save_model(tiny_model(family), tmp_path / "source"), [MLA, {"transform_coding": {**FAST}}]
    anymla.run(source, tmp_path / "mla", steps=steps[:1])
    anymla.run(source, tmp_path / "out", steps=steps)
    coded, plain, ids = load(tmp_path / "out"), load(tmp_path / "out", codec="none"), token_ids(1, 30)
    with Exact():
        assert (logits(plain, ids) - logits(load(tmp_path / "mla"), ids)).abs().max() < 1e-8
        for mine, other in zip(attentions(coded), attentions(plain), strict=True):

            def through(hidden, *more, encode=other.encoded, mine=mine):
                rows = zip((mine.key_codec, mine.value_codec), encode(hidden, *more), strict=True)
                return tuple(torch.cat([x[:, :FIRST], codec(x)[:, FIRST:]], 1) for codec, x in rows)

            other.encoded = through
        assert (logits(plain, ids) - logits(coded, ids)).abs().max() < 1e-4


def attentions(model):
    return [part for part in model.modules() if isinstance(part, LatentAttention)]


@pytest.mark.parametrize("kind", ["latent", "keys and values"])
def test_codes_are_turned_off_at_load(kind, tmp_path):
    original, ids = tiny_model("gemma2", torch.float64), token_ids(1, 20)
    if kind == "latent":
        coded_latent(original, tmp_path, bits=3)
    else:
        coded_model(original, "channels", "axes", 3, exact_window=5).save_pretrained(tmp_path / "out")
    plain = load(tmp_path / "out", codec="none")
    if kind != "latent":
        original.set_attn_implementation("eager")  # transformers 5.16's sdpa leaves the soft-cap out
        assert (logits(plain, ids) - logits(original, ids)).abs().max() < 3e-4
    cached = plain(input_ids=ids).past_key_values
    assert all(layer.keys.dtype == plain.dtype or layer.keys.shape[-1] == 24 * 8 for layer in cached.layers)
    plain.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(plain, ids))
    if kind == "latent":
        assert len(read_converted(tmp_path / "again").layers) == 2
    with pytest.raises(ValueError, match="codec must be none"):
        load(tmp_path / "out", codec="nuq")


@pytest.mark.parametrize(
    ("mla", "step", "message"),
    [
        ({"exact_window": 4}, {"kvquant": {}}, "its latent has an exact window"),
        ({}, {"transform_coding": {"exact_window": 4}}, "exact_window is 4, and a coded latent has none"),
        ({}, {"kvquant": {"codec": "int", "bits": 3}}, "codec int has bits of 4 or 8 or 16"),
        ({}, {"kvquant": {"codec": "fp8", "bits": 4}}, "codec fp8 has bits of 8 or 16"),
    ],
)
def test_refusals_are_one_line(mla, step, message, tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    with pytest.raises(AnymlaError, match=message) as caught:
        anymla.run(source, tmp_path / "out", steps=[{"mla": MLA["mla"] | mla}, step])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_grids_of_engines_count_their_scales(tmp_path):
    settings = {"codec": "int", "bits": 4, "block": 8}
    coded = coded_latent(make_model("llama", torch.float32), tmp_path, **settings)
    account = json.loads((tmp_path / "out" / "account.json").read_text())
    assert account["cache_bytes_per_token"] == account["measured"]["cache_bytes_per_token"]
    sizes = [codec for part in attentions(coded) for codec in (part.key_codec, part.value_codec)]
    expected = sum(-(-codec.width // 2) + 2 * -(-codec.width // 8) for codec in sizes)
    assert account["cache_bytes_per_token"] == expected


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("coded", "keys", "bits"), [[3, 5]], "keys: 5 coefficients, the layer has"),
        (("coded", "value_basis"), "axes", "a coded latent has its own basis"),
        (("latent", "exact_window"), 4, "a coded latent has no exact window"),
    ],
)
def test_a_broken_description_is_refused_in_one_line(where, value, message):
    attention = layers_of(coded_model(tiny_model("llama", torch.float32)).config.to_dict())[0]
    coding = Coding(bits=((4, 6),))
    coded = dataclasses.replace(attention.codes, keys=coding, values=dataclasses.replace(coding, bits=((4, 2),)))
    described = attention.to_dict() | {"coded": coded.to_dict(), "latent": {"kv_lora_rank": 6, "qk_rope_head_dim": 2}}
    assert LayerSpec.of(json.loads(json.dumps(described))).to_dict() == described
    *path, last = where
    place = described
    for name in path:
        place = place[name]
    place[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        LayerSpec.of(described)
    assert "\n" not in str(caught.value)


def test_tables_of_a_bfloat16_model_are_counted_as_they_are_stored(tmp_path):
    source = save_model(make_model("llama", torch.bfloat16), tmp_path / "source")
    dtype = {"dtype": "bfloat16"}
    coded = {"transform_coding": {"kv_cache": 0.25, **FAST, **dtype}}
    for name, steps in {"alone": [coded], "latent": [{"mla": MLA["mla"] | dtype}, coded]}.items():
        anymla.run(source, tmp_path / name, steps=steps)
        account = json.loads((tmp_path / name / "account.json").read_text())
        assert account["weight_bytes"] == account["measured"]["weight_bytes"], name

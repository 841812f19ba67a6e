"""LoRC on a trained model: exact at full rank, less loss with more bytes, and no text is read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.account import account
from anymla.architectures.attention import read_attention
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.architectures.parts import attention_path
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.lorc import weights as of_weights
from anymla.methods.lorc.settings import LoRC
from anymla.methods.lorc.weights import build_low_rank, leading_axes
from anymla.methods.mla.rank_survey import key_and_value, log_condition, source_of
from anymla.methods.ranks import Room, by_condition, by_depth, falling
from anymla.model_run.stream import decoder_layers
from anymla.modeling.coding_spec import CodedSpec, Coding
from tests.coded_models import attention_arguments, turns_of
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_model

LAYERS, WIDTH = 5, 32  # of the bundled model


def layers_of(model):
    """The layers as a sweep hands them to a method, as far as LoRC looks."""
    spec, names = read_model_spec(model.config.to_dict()), {module: name for name, module in model.named_modules()}
    found = []
    for index, block in enumerate(decoder_layers(model)):
        path = attention_path(block)
        known = {"module": block, "name": names[block], "attention_path": path, "attention": block.get_submodule(path)}
        found.append(
            SimpleNamespace(
                index=index,
                old=spec.layers[index],
                config=model.config,
                family=FAMILIES[spec.text_model_type],
                saved=model.dtype,
                dtypes={},
                **known,
            )
        )
    return found


def cut(model, ranks):
    """``model`` with keys and values of these ranks."""
    arguments = attention_arguments(model)
    for layer, rank in zip(layers_of(model), ranks, strict=True):
        source = read_attention(layer.attention, layer.old.attention, layer.family, layer.config)
        inv_freq, scale = turns_of(source, arguments[layer.index], model.config)
        coding = Coding(bits=((16, rank),), kind="plain")
        spec = CodedSpec(keys=coding, values=coding, first_tokens=0)
        attention = build_low_rank(layer, spec, SimpleNamespace(inv_freq=inv_freq, scale=scale), "weights")
        layer.module.set_submodule(layer.attention_path, attention)
    return model


@pytest.fixture(scope="module")
def ids():
    """Held-out windows."""
    tokenizer = load_tokenizer(bundled_model())
    return calibration_windows(bundled_text("valid"), tokenizer, tokens=2048, length=128, seed=0)


@pytest.fixture(scope="module")
def kl(ids):
    """The KL of the bundled model with layers of these ranks: ``kl(ranks)``."""

    @torch.no_grad()
    def log_probabilities(model):
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)

    expected = log_probabilities(bundled())

    def lost(ranks):
        found = log_probabilities(cut(bundled(), ranks))
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    return lost


def bundled():
    return AutoModelForCausalLM.from_pretrained(bundled_model()).eval()


def progressive(share, falls):
    return falling(falls, [Room(1, WIDTH)] * LAYERS, share * LAYERS * WIDTH)


@pytest.fixture(scope="module")
def falls():
    """The paper's, of the bundled model."""
    sources = map(source_of, layers_of(bundled()))
    return by_condition([sum(map(log_condition, key_and_value(source))) for source in sources])


def test_full_rank_is_the_original(kl):
    assert abs(kl([WIDTH] * LAYERS)) < 1e-6


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gptj", "gpt_neox", "gpt2"])
def test_full_rank_is_the_original_in_other_families(family):
    """Biases, norms of keys, interleaved or missing rope, a head whose projections are one."""
    model, ids = tiny_model(family), token_ids(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        ranks = [layer.old.attention.cached_numbers // 2 for layer in layers_of(model)]
        found = cut(model, ranks)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5  # angles are float32


def test_more_bytes_lose_less(kl):
    lost = [kl(progressive(share, [0.0] * LAYERS)) for share in (0.125, 0.25, 0.5, 0.75, 1.0)]
    assert lost == sorted(lost, reverse=True)


def test_the_first_layers_need_the_numbers(kl, falls, record_property):
    """The paper's schedule beats its reverse by far; against uniform and a straight line it is told, not asserted."""
    assert falls == sorted(falls)
    for share in (0.25, 0.5):
        schedules = {
            "progressive": falls,
            "reversed": falls[::-1],
            "linear": by_depth(LAYERS),
            "uniform": [0.0] * LAYERS,
        }
        lost = {name: kl(progressive(share, each)) for name, each in schedules.items()}
        for name, value in lost.items():
            record_property(f"kl of {name} at {share}", round(value, 4))
        assert lost["progressive"] < lost["reversed"]


def test_calibrated_axes_lose_less_than_those_of_weights(kl, monkeypatch):
    """Of the same rank: principal axes of keys and values on text (as in Palu) against singular vectors of weights."""
    ids = calibration_windows(bundled_text("train"), load_tokenizer(bundled_model()), tokens=4096, length=128, seed=0)
    model, seen = bundled(), {}
    for number, block in enumerate(decoder_layers(model)):
        for name in ("k_proj", "v_proj"):
            part = block.self_attn.get_submodule(name)
            part.register_forward_hook(lambda *given, place=(number, name): seen.update({place: given[-1]}))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    made = iter([seen[number, name] for number in range(LAYERS) for name in ("k_proj", "v_proj")])

    def principal_axes(gram, mean, rank):
        states = next(made).flatten(0, 1).double()
        return leading_axes(states.T @ states, mean, rank)

    ranks = [WIDTH // 4] * LAYERS
    of_the_weights = kl(ranks)
    monkeypatch.setattr(of_weights, "leading_axes", principal_axes)
    assert kl(ranks) < of_the_weights


def test_folded_is_unfolded():
    """Decode applies the values' second factor behind attention, prefill before; both ways are one."""
    model, ids = cut(make_model("llama", torch.float64), [6] * 2), token_ids(2, 12)
    outputs = []
    for expands in (False, True):
        for block in decoder_layers(model):
            block.self_attn.always_expands = expands
        with torch.no_grad():
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            outputs.append(model(input_ids=ids[:, -1:], past_key_values=cache).logits)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-10


def test_static_caches_and_beams_give_the_same_tokens(tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    anymla.run(source, tmp_path / "out", steps=[{"lorc": {"kv_cache": 0.5}}])
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double(), token_ids(2, 10)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **settings)
    assert torch.equal(greedy, model.generate(ids, cache_implementation="static", **settings))
    beams = [model.generate(ids, num_beams=3, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*beams)


def test_rope_of_a_model_in_16_bits_is_read_to_the_last_digit(tmp_path):
    """Tables in bfloat16 have three digits, which at position 1,000 would be another angle altogether."""
    source = save_model(make_model("llama", torch.bfloat16), tmp_path / "source")
    anymla.run(source, tmp_path / "out", steps=[{"lorc": {"kv_cache": 0.5, "dtype": "bfloat16"}}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for block in decoder_layers(model):
        found = block.self_attn.inv_freq.view(torch.float32)
        assert torch.allclose(found, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=1e-7)


def test_tuning_heals_it(tmp_path):
    """What was cut learns: the projections and both decoders."""
    tune = {"data": [str(bundled_text("train"))], "eval_data": str(bundled_text("valid")), "eval_tokens": 256}
    tune |= {"tokens": 1024, "length": 64, "batch": 4, "device": "cpu"}
    anymla.run(bundled_model(), tmp_path / "out", steps=[{"lorc": {"kv_cache": 0.5}}, {"tune": tune}], keep_steps=True)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "out-steps" / "step-1-lorc", tmp_path / "out")
    )
    changed = {name.split("self_attn.")[-1] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {"k_proj.weight", "v_proj.weight", "key_decoder.weight", "value_decoder.weight"} <= changed


@pytest.mark.parametrize("rope", ["reconstruct", "partial"])
def test_no_text_is_read(rope, tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("a text was read")

    monkeypatch.setattr("anymla.data.text.read_documents", refuse)
    settings = {"kv_cache": 0.5, "ranks": "progressive", "rope": rope}
    settings |= {"key_share": 0.4} if rope == "reconstruct" else {}
    anymla.run(bundled_model(), tmp_path / "out", steps=[{"lorc": settings}])
    written = json.loads((tmp_path / "out" / "account.json").read_text())
    names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once")
    assert all(written[name] == written["measured"][name] for name in names)
    before = account(read_model_spec(read_config(bundled_model()))).cache_bytes_per_token
    assert written["cache_bytes_per_token"] == before // 2
    assert "calibration" not in LoRC.model_fields


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_ranks_fall_and_keep_the_budget(share):
    """The shapes of Llama-2-7B, with condition numbers of any layers."""
    generator = torch.Generator().manual_seed(0)
    conditions = torch.rand(32, generator=generator).mul(5).tolist()
    ranks = falling(by_condition(conditions), [Room(8, 4096)] * 32, share * 32 * 4096, 8)
    assert ranks == sorted(ranks, reverse=True) and all(rank % 8 == 0 for rank in ranks)
    assert abs(sum(ranks) / (share * 32 * 4096) - 1) < 0.01
    assert ranks[0] == 4096 or ranks[-1] == 8  # r_min gives way first, then r_max
    even = falling([0.0] * 32, [Room(8, 4096)] * 32, share * 32 * 4096, 8)
    assert set(even) == {round(share * 4096)}


@pytest.mark.parametrize("key_share", [0.05, 0.3, 0.5, 0.95])
def test_keys_and_values_share_a_budget(key_share):
    spec = read_model_spec(read_config(bundled_model()))
    for share in (0.05, 0.5, 0.9):
        plan = LoRC(kv_cache=share, key_share=key_share).plan(spec)
        even = LoRC(kv_cache=share).plan(spec)
        for layer, other in zip(plan.choices, even.choices, strict=True):
            assert layer.key_rank + layer.value_rank == other.key_rank + other.value_rank
            assert 1 <= layer.key_rank <= WIDTH and 1 <= layer.value_rank <= WIDTH
        assert account(plan.after).cache_bytes_per_token == account(even.after).cache_bytes_per_token


def test_a_straight_line_where_conditions_are_alike():
    assert by_condition([2.0] * 5) == by_depth(5) == [0, 0.25, 0.5, 0.75, 1]
    assert by_condition([0.0] * 5) == by_depth(5)


def test_noise_of_the_smallest_singular_values_does_not_count():
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1e-9], dtype=torch.float64))
    assert log_condition(weight) == pytest.approx(torch.tensor(2.0).log().item())  # 1 is the last 0.05, beyond 99.9 %
    assert log_condition(torch.zeros(3, 3, dtype=torch.float64)) >= 0


def test_refusals_name_why(tmp_path):
    spec = read_model_spec(read_config(bundled_model()))
    converted = LoRC(kv_cache=0.5).plan(spec).after
    for rope in ("reconstruct", "partial"):
        assert "converted already" in LoRC(rope=rope).refuses(converted)
    with pytest.raises(AnymlaError, match="at least"):
        anymla.run(bundled_model(), tmp_path / "out", steps=[{"lorc": {"kv_cache": 0.01}}])
    with pytest.raises(AnymlaError, match="do not go together"):
        anymla.run(bundled_model(), tmp_path / "out", steps=["lorc", "mla"])

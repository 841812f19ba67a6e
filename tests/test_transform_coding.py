"""Transform coding: exact bases, the best bits at a budget, and a checkpoint that costs what the plan says."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from operator import mul

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import anymla
from anymla.account import account
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.errors import InfeasibleError
from anymla.methods.base import method_of
from anymla.methods.cache_coding.allocation import DISTORTION, allocate, code_bytes
from anymla.methods.cache_coding.basis import Moments, axes, channels, in_parts
from anymla.methods.cache_coding.plan import Energies, decode_cost, ordered, plan_layers
from anymla.methods.cache_coding.rope import frequencies
from anymla.methods.cache_coding.transform_coding import TransformCoding
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import layers_of
from tests.families import make_model, save_model, token_ids
from tests.family_models import tiny_config, tiny_model

HEADS, DIMS, PAIRS = 3, 10, 4
MIXED = ["sliding_attention", "full_attention"]
FAST = {"calibration_tokens": 1024, "calibration_length": 64}


@pytest.fixture(scope="module")
def moments():
    torch.manual_seed(0)
    width = HEADS * DIMS
    states, gradients = (torch.randn(400, width) @ torch.randn(width, width) for _ in range(2))
    states, gradients = states.double() + 3, gradients.double()
    covariance = torch.cov(states.T, correction=0)
    return Moments(mean=states.mean(0), covariance=covariance, fisher=gradients.T @ gradients / 400).shrunk()


def bases(moments):
    heads = (len(moments.mean) // HEADS,) * HEADS
    by_head = in_parts(moments, heads, lambda block: channels(block, PAIRS, 1))
    return axes(moments), channels(moments, PAIRS, HEADS), in_parts(moments, heads, axes), by_head


def test_bases_are_exact_and_keep_what_errors_cost(moments):
    eye = torch.eye(HEADS * DIMS, dtype=torch.float64)
    for basis in bases(moments):
        assert (basis.encoder @ basis.decoder - eye).abs().max() < 1e-10
        states = torch.randn(5, HEADS * DIMS, dtype=torch.float64)
        assert torch.allclose(basis.encode(states) @ basis.decoder + basis.mean, states)
    found, total = axes(moments), (moments.fisher @ moments.covariance).trace()
    assert found.energies.sum().item() == pytest.approx(total.item())
    assert (found.energies.diff() <= 1e-9).all()
    costs = ((found.decoder @ moments.fisher) * found.decoder).sum(1)
    assert torch.allclose(costs, costs[:1].expand(len(costs)))  # an error costs its square
    whole, complex_axes, by_head, phases = (basis.energies.log().sum() for basis in bases(moments))
    assert whole < complex_axes < phases and whole < by_head < phases


def test_channels_commute_with_rope(moments):
    basis, angles = channels(moments, PAIRS, HEADS), torch.rand(PAIRS, dtype=torch.float64) * 6
    turned = torch.polar(torch.ones_like(angles), angles)
    states = torch.randn(7, HEADS, DIMS, dtype=torch.float64)
    pairs = torch.complex(states[..., :PAIRS], states[..., PAIRS : 2 * PAIRS]) * turned
    rotated = torch.cat([pairs.real, pairs.imag, states[..., 2 * PAIRS :]], -1).flatten(1)
    found, total = states.flatten(1) @ basis.encoder, HEADS * PAIRS
    pairs = torch.complex(found[:, :total], found[:, total : 2 * total]) * turned[basis.frequency[:total]]
    expected = torch.cat([pairs.real, pairs.imag, found[:, 2 * total :]], -1)
    assert torch.allclose(rotated @ basis.encoder, expected)


@pytest.mark.parametrize("budget", [3, 5, 8])
def test_bits_are_the_best_at_a_budget(budget):
    """Eight equal coefficients each, so that a bit of all of them is a byte and nothing is padded."""
    energies = [[9.0, 0.4, 0.01], [2.0, 0.3, 0.02]]
    bits = allocate([[each for each in row for _ in range(8)] for row in energies], budget)
    found = [row[place] for row in bits for place in range(0, 24, 8)]
    assert all(row[start : start + 8] == row[start : start + 1] * 8 for row in bits for start in range(0, 24, 8))
    assert sum(map(code_bytes, bits)) <= budget

    def lost(choice):
        return sum(energy * DISTORTION[each] for energy, each in zip([*energies[0], *energies[1]], choice, strict=True))

    fitting = (choice for choice in itertools.product(range(7), repeat=6) if sum(choice) <= budget)
    assert lost(found) == pytest.approx(min(map(lost, fitting)))


def test_every_row_has_a_byte_and_no_byte_is_left():
    torch.manual_seed(0)
    rows = [(torch.rand(37).pow(6) * scale).tolist() for scale in (1.0, 1e-9, 30.0, 0.1)]
    for budget in (4, 11, 60):
        sizes = [code_bytes(bits) for bits in allocate(rows, budget)]
        assert min(sizes) >= 1
        assert sum(sizes) == budget


@pytest.mark.parametrize("decode_cost_limit", [1.0, 2.0, "any"])
def test_plans_keep_to_bytes_and_to_the_cost_of_decoding(decode_cost_limit, tmp_path):
    spec = read_model_spec(read_config(save_model(make_model("llama", torch.float32), tmp_path / "model")))
    settings = TransformCoding(kv_cache=0.25, decode_cost=decode_cost_limit)
    tight = TransformCoding(kv_cache=0.25, decode_cost=0.2).plan(spec)
    attentions = list(spec.attention_layers.values())
    planned = settings.plan(spec)
    rows = [coding for layer in planned.after.layers for coding in (layer.coded.keys, layer.coded.values)]
    assert sum(coding.row_bytes for coding in rows) <= 0.25 * 2 * sum(each.cached_numbers for each in attentions)
    for attention, layer in zip(attentions, planned.choices, strict=True):
        assert (layer.key_basis == "axes") == (decode_cost_limit == "any")
        if decode_cost_limit != "any":
            original = 2 * attention.num_heads * attention.head_dim
            assert decode_cost(attention, layer) <= decode_cost_limit * original
        places = ordered(layer.key_bits, layer.keys, "key", attention)
        assert sorted(places) == list(range(len(layer.key_bits)))
        if layer.key_basis == "channels":
            total, width = layer.key_block * attention.rope_pairs, layer.key_block * attention.head_dim
            for start in range(0, len(places), width):
                real, imag = places[start : start + total], places[start + total : start + 2 * total]
                assert imag == [place + total for place in real] and min(places[start : start + width]) == start
    better = plan_layers(attentions, [Energies.typical(each, settings) for each in attentions], settings)
    assert [each.model_dump() for each in better] == [each.model_dump() for each in planned.choices]
    for attention, layer in zip(attentions, tight.choices, strict=True):
        assert 0 < decode_cost(attention, layer) <= 0.2 * 2 * attention.num_heads * attention.head_dim


def test_what_cannot_be_met_names_the_lever(tmp_path):
    spec = read_model_spec(read_config(save_model(make_model("llama", torch.float32), tmp_path / "model")))
    with pytest.raises(InfeasibleError, match=r"smallest possible is kv_cache 0\.0209"):
        TransformCoding(kv_cache=0.01).plan(spec)
    with pytest.raises(InfeasibleError, match=r"smallest possible is decode_cost 0\.0625"):
        TransformCoding(decode_cost=0.05).plan(spec)


def test_frequencies_come_out_of_tables():
    expected = torch.tensor([1.0, 0.03, 1e-6, -0.5]).float()
    angles = torch.arange(300.0)[:, None] * expected
    found, scale = frequencies(angles.cos() * 1.25, angles.sin() * 1.25)
    assert torch.allclose(found, expected.double(), rtol=1e-6, atol=1e-9)
    assert scale == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"decode_cost": "any"}), ("qwen3", {"decode_cost": 2.0}), ("mistral", {"decode_cost": 1.0})],
)
def test_a_coded_model_costs_what_was_planned_and_is_near_the_original(family, settings, tmp_path):
    source = save_model(make_model(family, torch.float32, head_dim=8, sliding_window=None), tmp_path / "model")
    step = {"kv_cache": 0.5, **settings, **FAST}
    anymla.run(source, tmp_path / "out", steps=[{"transform_coding": step}])
    found = json.loads((tmp_path / "out" / "account.json").read_text())
    assert found["cache_bytes_per_token"] == found["measured"]["cache_bytes_per_token"] <= 96
    assert method_of("transform_coding", step).plan(read_model_spec(read_config(source))).choices[0].facts is None
    ids = token_ids()
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits.log_softmax(-1)
            for name in ("model", "out")
        )
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.2
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["anymla"]["layers"]
    assert Counter(layer["coded"].get("key_basis", "axes") for layer in layers).total() == 2


def test_layers_with_windows_get_more_bits_where_the_context_is_long():
    """At 64 tokens, the windows of 17 hold a quarter of them; the bytes of the whole cache are then the budget."""
    full = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, rope_pairs=8, cached_heads=2)
    attentions = [full, replace(full, sliding_window=17, cache_window=17)]
    settings = TransformCoding(kv_cache=0.25, decode_cost="any", exact_window=0)
    energies = [Energies.typical(each, settings) for each in attentions]
    even = plan_layers(attentions, energies, settings)
    far = plan_layers(attentions, energies, settings.model_copy(update={"context": 64}))
    sizes = [[code_bytes(each.key_bits) + code_bytes(each.value_bits) for each in plan] for plan in (even, far)]
    assert sizes[0][0] == sizes[0][1]
    assert sizes[1][0] < sizes[0][0] < sizes[1][1]
    held, numbers = (64, 16), full.cached_numbers
    share = sum(map(mul, held, sizes[1])) / (2 * numbers * sum(held))
    assert 0.24 < share <= 0.25
    with pytest.raises(InfeasibleError, match="leaves 102 bytes at 64 tokens"):
        plan_layers(attentions, energies, settings.model_copy(update={"context": 64, "kv_cache": 0.01}))


@pytest.mark.parametrize("window", [0, 16, 300])
def test_at_a_context_all_bytes_are_the_share(window):
    """Those of exact tokens too; 300 of them are no window in the layers that see 512."""
    sizes = {"head_dim": 32, "sliding_window": 512, "max_position_embeddings": 1 << 17, "layer_types": MIXED}
    original = read_model_spec(tiny_config("gemma3_text", dtype="bfloat16", **sizes).to_dict())
    for context in (600, 4096, 1 << 16):
        step = TransformCoding(kv_cache=0.75, context=context, exact_window=window, calibration_length=1024)
        planned = step.plan(original).after
        assert [layer.coded.exact_window for layer in planned.layers] == [window % 300, window]
        coded, whole = (account(each, (context,)).cache_bytes_at[str(context)] for each in (planned, original))
        assert 0.74 * whole < coded <= 0.75 * whole
    with pytest.raises(InfeasibleError, match=r"beside \d+ of first and latest tokens") as told:
        TransformCoding(kv_cache=0.125, context=64).plan(original)
    least = float(str(told.value).rsplit(" ", 1)[1])
    TransformCoding(kv_cache=least, context=64).plan(original)


def test_at_a_context_codes_of_a_latent_are_the_share_of_all_bytes():
    original = read_model_spec(tiny_config("llama", dtype="bfloat16", head_dim=32).to_dict())
    latent = method_of("mla", {"kv_cache": 0.5}).plan(original).after
    planned = TransformCoding(kv_cache=0.25, context=64).plan(latent).after
    coded, whole = (account(each, (64,)).cache_bytes_at["64"] for each in (planned, original))
    assert 0.24 * whole < coded <= 0.25 * whole


def test_layers_with_an_exact_window_and_without_one(tmp_path):
    sliding = tiny_model("gemma3_text", sliding_window=40, layer_types=MIXED)
    step = {"kv_cache": 0.5, "context": 4096, "exact_window": 32, "calibration_tokens": 1024, "calibration_length": 128}
    source = save_model(sliding.to(torch.bfloat16), tmp_path / "model")
    anymla.run(source, tmp_path / "out", steps=[{"transform_coding": step}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert [layer.coded.exact_window for layer in layers_of(model.config.to_dict())] == [0, 32]
    ids, cache = token_ids(2, 100), DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([50, 1, 30, 1, 18], dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-6 * whole.abs().max()

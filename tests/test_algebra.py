"""Properties of the algebra, on random shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymla.architectures.attention import AttentionWeights
from anymla.methods.mla.channels import no_channels
from anymla.methods.mla.factorization import FACTORIZATIONS
from anymla.methods.mla.latent import LatentProblem
from anymla.methods.mla.moments import MomentSums, rotate, to_complex
from anymla.methods.mla.refit import OutputBatch, best_change, normal_equations, refit_output
from anymla.methods.mla.rope import ROPE_CHOICES
from anymla.methods.mla.rope.channel_pca import SpreadPCA
from anymla.methods.mla.settings import SHARED_ROPES
from anymla.modeling.absorbed import additive_mask

CHOICES = ROPE_CHOICES | {"spread": SpreadPCA()}

shapes = st.tuples(
    st.integers(1, 4),  # kv heads
    st.integers(1, 3),  # query heads per kv head
    st.integers(0, 4),  # pairs
    st.integers(0, 3),  # dims of a head without rope
    st.integers(0, 1000),  # seed
).filter(lambda shape: shape[2] + shape[3] > 0)
fast = settings(max_examples=25, deadline=None)


def layer(shape, tokens=60):
    """Random weights, activations and their moments."""
    kv_heads, group, pairs, rest, seed = shape
    random = torch.Generator().manual_seed(seed)
    heads, d = kv_heads * group, 2 * pairs + rest
    hidden = 2 * kv_heads * d + 3

    def normal(*size):
        return torch.randn(size, generator=random, dtype=torch.float64)

    weights = AttentionWeights(
        query=normal(heads, d, hidden),
        key=normal(kv_heads, d, hidden),
        value=normal(kv_heads, d, hidden),
        query_bias=normal(heads, d),
        key_bias=normal(kv_heads, d),
        value_bias=normal(kv_heads, d),
        output=normal(hidden, heads, d),
        output_bias=normal(hidden),
        key_gain=torch.ones(kv_heads, d, dtype=torch.float64),
        rope_pairs=pairs,
        scaling=d**-0.5,
    )
    x = normal(2, tokens, hidden) / math.sqrt(hidden)
    query = torch.einsum("hdD,btD->bhtd", weights.query, x) + weights.query_bias[:, None]
    key = torch.einsum("gdD,btD->bgtd", weights.key, x) + weights.key_bias[:, None]
    value = torch.einsum("gdD,btD->bgtd", weights.value, x) + weights.value_bias[:, None]
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(pairs)
    sums = MomentSums(weights)
    sums.add(query, key, value, angle.cos()[None, None], angle.sin()[None, None], None)
    return weights, sums.moments(), (query, key, value, torch.polar(torch.ones_like(angle), angle))


def choose(name, moments, rope_dims):
    """The channels by one of the choices, which are not asked where rope turns nothing (methods/mla/weights.py)."""
    if not moments.key_norm.numel():
        return no_channels(moments)
    return CHOICES[name](moments, rope_dims, expected_rotation=True)


@fast
@given(shapes, st.floats(0, 1), st.sampled_from(list(CHOICES)))
def test_channels_and_remainder_give_back_every_key(shape, share, name):
    """k = decode(encode(k)) + remainder(k): what the channels carry and what they leave are the key."""
    kv_heads, _, pairs, rest, _ = shape
    _, moments, (_, key, _, _) = layer(shape)
    d = 2 * pairs + rest
    step = 1 if name in (*SHARED_ROPES, "spread") else kv_heads
    rope_dims = 2 * step * round(share * kv_heads * pairs / step)
    channels = choose(name, moments, rope_dims)
    flat = key.transpose(1, 2).flatten(2)
    coded = to_complex(flat @ channels.encoder(pairs, d).T)
    parts = torch.zeros(*flat.shape[:2], kv_heads, pairs, dtype=torch.complex128)
    for j, frequency in enumerate(channels.index.tolist()):
        parts[..., frequency] += coded[..., j % len(channels), None] * channels.decode[j]
    carried = torch.cat([parts.real, parts.imag, parts.real.new_zeros(*parts.shape[:3], rest)], -1).flatten(2)
    remainder = channels.remainder(pairs, d)
    assert torch.allclose(carried + flat @ remainder.T, flat, atol=1e-9)
    without_rope = torch.arange(kv_heads * d).view(kv_heads, d)[:, 2 * pairs :].flatten()
    everything = torch.eye(kv_heads * d, dtype=torch.float64)
    assert torch.equal(remainder[without_rope], everything[without_rope])  # no channel carries those
    assert torch.equal(remainder[:, without_rope], everything[:, without_rope])


@fast
@given(shapes)
def test_mixing_heads_within_a_frequency_commutes_with_rope(shape):
    """All channels give every score: sum_j q conj(b_j) turn_m conj(s_j turn_n) = q turn_m conj(k turn_n).

    Of the dims that rope turns: the others come from the latent.
    """
    kv_heads, group, pairs, rest, _ = shape
    _, moments, (query, key, _, turn) = layer(shape)
    channels = choose("channel-pca", moments, 2 * kv_heads * pairs)
    coded = (
        to_complex(key.transpose(1, 2).flatten(2) @ channels.encoder(pairs, 2 * pairs + rest).T)
        * turn[:, channels.index]
    )
    weight = channels.decode.conj().T.repeat_interleave(group, 0)  # [H,K]
    query, key = query[..., : 2 * pairs], key[..., : 2 * pairs]
    asked = to_complex(query)[..., channels.index] * weight[None, :, None] * turn[:, channels.index]
    scores = torch.einsum("bhmk,bnk->bhmn", asked, coded.conj()).real
    true_key = rotate(key, turn).repeat_interleave(group, 1)
    assert torch.allclose(scores, rotate(query, turn) @ true_key.transpose(-1, -2), atol=1e-8)


@fast
@given(shapes, st.floats(0.05, 1), st.sampled_from(list(FACTORIZATIONS)))
def test_factorizations_are_projections_and_exact_at_full_rank(shape, share, name):
    weights, moments, _ = layer(shape)
    channels = choose("channel-pca", moments, 0)
    problem = LatentProblem(weights, moments, channels, moments.rotation)
    full = 2 * problem.key_size
    latent = FACTORIZATIONS[name](problem, max(1, round(share * full)))
    encoded_again = latent.encoder @ latent.decoder
    assert torch.allclose(encoded_again, torch.eye(len(encoded_again), dtype=torch.float64), atol=1e-7)
    complete = FACTORIZATIONS[name](problem, full)
    assert torch.allclose(complete.decoder @ complete.encoder, torch.eye(full, dtype=torch.float64), atol=1e-7)


@fast
@given(shapes, st.floats(0.05, 1), st.sampled_from(list(FACTORIZATIONS)))
def test_constants_are_coded_where_they_do_not_cancel(shape, share, name):
    """Under a soft-cap, a sink or a gate the latent carries the mean as well, and at full rank all of y is exact."""
    weights, moments, (_, key, value, _) = layer(shape)
    channels = choose("channel-pca", moments, 0)
    problem = LatentProblem(replace(weights, centred=False), moments, channels, moments.rotation)
    full = 2 * problem.key_size
    assert not FACTORIZATIONS[name](problem, max(1, round(share * full))).mean.any()
    latent = FACTORIZATIONS[name](problem, full)
    y = torch.cat([states.transpose(1, 2).flatten(2) for states in (key, value)], -1)
    assert torch.allclose(y @ (latent.decoder @ latent.encoder).T, y, atol=1e-6)


@fast
@given(shapes, st.floats(0.1, 0.9))
def test_output_aware_is_best_in_its_own_metric(shape, share):
    """No other factorisation loses less of E || M^1/2 (y - y~) ||^2, the quantity that output-aware minimises."""
    weights, moments, _ = layer(shape)
    channels = choose("channel-pca", moments, 0)
    problem = LatentProblem(weights, moments, channels, moments.rotation)
    rank = max(1, round(share * 2 * problem.key_size))
    metric = torch.block_diag(*problem.metric)
    covariance = problem.weighted_gram - torch.outer(problem.weighted_mean, problem.weighted_mean)

    def lost(name):
        latent = FACTORIZATIONS[name](problem, rank)
        rest = torch.eye(len(metric), dtype=torch.float64) - latent.decoder @ latent.encoder
        return (metric @ rest @ covariance @ rest.T).trace().item()

    best = lost("output-aware")
    for other in ("joint-svd", "split-svd", "whitened", "balanced-pca"):
        assert best <= lost(other) * (1 + 1e-2) + 1e-9


@fast
@given(shapes)
def test_expected_rotation_is_the_attention_weighted_mean(shape):
    """rho_{h,f} = E[e^{i Delta theta_f}], against the definition written out over all pairs of positions."""
    group = shape[1]
    weights, moments, (query, key, _, turn) = layer(shape, tokens=12)
    true_key = rotate(key, turn).repeat_interleave(group, 1)
    scores = rotate(query, turn) @ true_key.transpose(-1, -2) * weights.scaling
    attention = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    phase = turn[:, None] * turn[None].conj()  # e^{i (m - n) theta}
    expected = torch.einsum("bhmn,mnp->hp", attention.to(phase.dtype), phase) / (2 * 12)
    assert torch.allclose(moments.rotation, expected, atol=1e-9)


@fast
@given(shapes)
def test_sensitivities_match_their_definition(shape):
    """wk = E_t sum_n a^2 ||W_o (v_n - o_t)||^2 and wv = E_t sum_n a^2, written out head by head."""
    kv_heads, group = shape[:2]
    weights, moments, (query, key, value, turn) = layer(shape, tokens=10)
    for head in range(kv_heads * group):
        k, v = key[:, head // group], value[:, head // group]
        scores = rotate(query[:, head], turn) @ rotate(k, turn).transpose(-1, -2) * weights.scaling
        a = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        image = v @ weights.output[:, head].T
        difference = image[:, None] - (a @ image)[:, :, None]
        key_weight = (a.square() * difference.square().sum(-1)).sum() / 20
        assert torch.isclose(moments.key_weight[head], key_weight, rtol=1e-6)
        assert torch.isclose(moments.value_weight[head], a.square().sum() / 20, rtol=1e-9)


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_refit_finds_what_a_linear_map_lacks(seed, features, outputs):
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(features, outputs, generator=random, dtype=torch.float64)
    x = torch.randn(3, 200, features, generator=random, dtype=torch.float64)
    offset = torch.randn(outputs, generator=random, dtype=torch.float64)
    fit, choice = (normal_equations([OutputBatch(part, part @ truth + offset)]) for part in (x, x[:1]))
    change = best_change(fit, choice)
    assert torch.allclose(change[:-1], truth, atol=1e-2)
    assert torch.allclose(change[-1], offset, atol=1e-2)


def test_refit_leaves_alone_what_it_cannot_help():
    random = torch.Generator().manual_seed(0)
    x, noise = torch.randn(1, 12, 8, generator=random), torch.randn(1, 12, 4, generator=random)
    other, noise2 = torch.randn(1, 400, 8, generator=random), torch.randn(1, 400, 4, generator=random)
    assert best_change(*(normal_equations([OutputBatch(*each)]) for each in ((x, noise), (other, noise2)))) is None


def test_streamed_moments_are_those_of_all_tokens_at_once():
    shape = (2, 2, 3, 1, 7)
    weights, moments, (query, key, value, turn) = layer(shape)
    cos, sin = turn.real[None, None], turn.imag[None, None]
    sums = MomentSums(weights)
    for part in range(2):
        sums.add(query[part : part + 1], key[part : part + 1], value[part : part + 1], cos, sin, None)
    parts = sums.moments()
    for name, whole in vars(moments).items():
        if name == "sample":  # of the first batch
            continue
        streamed = getattr(parts, name)
        assert streamed == pytest.approx(whole) if isinstance(whole, float) else torch.allclose(streamed, whole)


@pytest.mark.parametrize("masked", ["causal", "sliding", "biased", "hides a row"])
@pytest.mark.parametrize("window", [0, 5])
def test_moments_by_blocks_of_rows_are_those_of_all_rows_at_once(masked, window, monkeypatch):
    weights, _, (query, key, value, turn) = layer((2, 2, 3, 1, 7))
    cos, sin = turn.real[None, None], turn.imag[None, None]
    shape, random = (60, 60), torch.Generator().manual_seed(0)
    allowed = torch.ones(shape, dtype=torch.bool).tril() & torch.ones(shape, dtype=torch.bool).triu(-9)
    mask = additive_mask(allowed[None, None], torch.float64)
    if masked == "biased":
        mask = mask + torch.randn(1, 4, *shape, generator=random, dtype=torch.float64)
    elif masked == "hides a row":
        mask[:, :, 20] = mask.min()
    found = []
    for rows in (7, 60):
        monkeypatch.setattr("anymla.methods.mla.moments.BLOCK_ROWS", rows)
        sums = MomentSums(weights, window)
        sums.add(query, key, value, cos, sin, None if masked == "causal" else mask)
        found.append(sums.moments())
    for name in ("rotation", "key_weight", "value_weight", "weighted_gram", "weighted_mean"):
        assert torch.allclose(*(getattr(each, name) for each in found), rtol=1e-9, atol=1e-12), name


def test_a_refit_says_what_its_output_still_lacks():
    random = torch.Generator().manual_seed(0)
    attention = torch.nn.Module()
    attention.o_proj = projection = torch.nn.Linear(6, 4).double().requires_grad_(False)
    x = torch.randn(2, 50, 6, generator=random, dtype=torch.float64)
    target = x @ torch.randn(6, 4, generator=random, dtype=torch.float64) + 1

    def batches(part):
        yield OutputBatch(x[part], target[part] - projection(x[part]))

    said = refit_output(attention, batches, slice(0, 1), slice(1, 2), torch.bfloat16)
    lacking = target[1] - projection(x[1])
    assert said == pytest.approx(lacking.square().sum().item(), rel=1e-9)
    assert torch.equal(projection.weight, projection.weight.bfloat16().double())

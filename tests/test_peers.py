"""TransMLA (arXiv 2502.07864) and EliteKV (arXiv 2503.01586) against references written from their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import anymla
from anymla.methods.mla.moments import rotate, to_complex
from anymla.methods.mla.rope import ROPE_CHOICES
from anymla.methods.mla.rope.rorope import RoRoPE
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.test_algebra import fast, layer
from tests.test_paper import HEAD_DIM, HEADS, KV_HEADS, PAIRS, attention_inputs, calibration_ids

shapes = st.tuples(
    st.integers(1, 3),  # kv heads
    st.integers(1, 3),  # query heads per kv head
    st.integers(1, 4),  # pairs
    st.integers(0, 2),  # dims of a head without rope
    st.integers(0, 1000),  # seed
)


def fold_axes(key, fold):
    """TransMLA's orthogonal U of every fold of ``fold`` frequencies, [folds, G fold, G fold], columns sorted."""
    grouped = to_complex(key[..., : 2 * PAIRS]).unflatten(-1, (-1, fold))  # [B,G,T,folds,fold]
    rows = grouped.permute(3, 0, 2, 1, 4).flatten(3)  # [folds,B,T,G fold]
    both = torch.cat([rows.real, rows.imag], 1).flatten(1, 2)  # real and imaginary parts are one more batch
    return torch.linalg.eigh(both.mT @ both).eigenvectors.flip(-1)


def transmla_attention(attention, states, frequency, axes, kept):
    """Rotates all heads as one vector by U; the first parts of each fold keep RoPE, at frequencies ::P/kept."""
    fold, (batch, length, _) = axes.shape[1] // KV_HEADS, states.shape
    query = attention.q_proj(states).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
    key = attention.k_proj(states).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
    value = attention.v_proj(states).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)

    def turned(heads, owner):
        """Complex heads [B,N,T,P] of kv heads ``owner`` as they lie in U's coordinates, [B,N,T,folds,G fold]."""
        wide = torch.zeros(*heads.shape[:3], PAIRS // fold, KV_HEADS, fold, dtype=torch.complex128)
        for number, group in enumerate(owner):
            wide[:, number, :, :, group] = heads[:, number].unflatten(-1, (-1, fold))
        return torch.einsum("bntcw,cwv->bntcv", wide.flatten(4), axes.to(wide.dtype))

    asked = turned(to_complex(query), [head * KV_HEADS // HEADS for head in range(HEADS)])
    found = turned(to_complex(key), range(KV_HEADS)).sum(1)  # one key for all heads
    angle = torch.zeros(length, PAIRS // fold, KV_HEADS * fold, dtype=torch.float64)
    collapse, per_fold = PAIRS // kept, kept * fold // PAIRS
    for number in range(PAIRS // fold):
        for component in range(per_fold):
            rate = frequency[number * fold + component * collapse].double()
            angle[:, number, component] = torch.arange(length) * rate
    turn = torch.polar(torch.ones_like(angle), angle)
    scores = torch.einsum("bnmcv,btcv->bnmt", asked * turn, (found * turn).conj()).real / HEAD_DIM**0.5
    weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    output = weights @ value.repeat_interleave(HEADS // KV_HEADS, 1)
    return attention.o_proj(output.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("fold", "kept"), [(1, 4), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)])
@torch.no_grad()
def test_rorope_is_the_papers_function(tmp_path, fold, kept):
    """With a latent of full rank all that is lost is rotation, and it is lost as TransMLA loses it."""
    model = make_model("llama", torch.float64, head_dim=HEAD_DIM)
    source = save_model(model, tmp_path / "source")
    rope = "rorope" if fold == 1 else f"freqfold-{fold}"
    settings = {"rope": rope, "factorization": "balanced-pca", "expected_rotation": False}
    anymla.convert(source, tmp_path / "out", rope_dims=2 * kept, kv_rank=2 * KV_HEADS * HEAD_DIM, **settings, **FAST)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = token_ids()
    hidden = model.model.embed_tokens(ids)
    for decoder, states in zip(model.model.layers, attention_inputs(model, calibration_ids(source))):
        attention = decoder.self_attn
        key = attention.k_proj(states).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        rest = (model.model.rotary_emb.inv_freq, fold_axes(key, fold), kept)
        hidden = hidden + transmla_attention(attention, decoder.input_layernorm(hidden), *rest)
        hidden = hidden + decoder.mlp(decoder.post_attention_layernorm(hidden))
    expected = model.lm_head(model.model.norm(hidden))
    assert (expected - logits(model, ids)).abs().max() > 0.01 or kept == PAIRS * KV_HEADS
    assert (logits(converted, ids) - expected).abs().max() < 1e-5
    whole = converted(ids, use_cache=False).logits[:, -1]
    start = converted(ids[:, :-1], use_cache=True)
    step = converted(ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
    assert (whole - step).abs().max() < 1e-9


@fast
@given(shapes, st.integers(1, 12))
def test_one_head_without_fold_is_the_uniform_choice(shape, channels):
    """Of a single kv head there is nothing to mix: RoRoPE collapsed to fewer dims is MHA2MLA's uniform grid."""
    _, moments, _ = layer((1, *shape[1:]))
    dims = 2 * min(channels, shape[2])
    found = ROPE_CHOICES["rorope"](moments, dims, expected_rotation=False)
    uniform = ROPE_CHOICES["uniform"](moments, dims, expected_rotation=False)
    assert torch.equal(found.index, uniform.index)
    product = found.decode * found.encode
    assert torch.allclose(product, uniform.decode * uniform.encode)


@fast
@given(shapes, st.integers(1, 12), st.integers(1, 5))
def test_folded_channels_are_orthonormal_and_fold_one_is_rorope(shape, channels, fold):
    kv_heads, _, pairs, rest, _ = shape
    _, moments, _ = layer(shape)
    dims = 2 * min(channels, kv_heads * pairs)
    folded = RoRoPE(fold)(moments, dims, expected_rotation=False)
    rows = folded.encoder(pairs, 2 * pairs + rest)
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), atol=1e-9)
    if pairs % 2 and fold == 2:  # two does not divide an odd number
        plain = ROPE_CHOICES["rorope"](moments, dims, expected_rotation=False)
        assert torch.equal(folded.index, plain.index)
        assert torch.equal(folded.encode, plain.encode)


def score_errors(data, weights, pairs, kept):
    """Mean |score error| of a kv head per query head where only ``kept`` [G][k] pairs turn, by rotating for real."""
    query, key, _, turn = data
    group = query.shape[1] // key.shape[1]
    allowed = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).tril()
    full = rotate(query, turn) @ rotate(key, turn).repeat_interleave(group, 1).mT
    errors = []
    for head, chosen in enumerate(kept):
        some = torch.ones_like(turn)
        some[:, list(chosen)] = turn[:, list(chosen)]
        heads = slice(head * group, (head + 1) * group)
        scores = rotate(query[:, heads], some) @ rotate(key[:, head], some).unsqueeze(1).mT
        errors.append((scores - full[:, heads])[..., allowed].abs().mean().item())
    return errors


@fast
@given(shapes, st.integers(1, 4))
def test_elite_is_the_greedy_choice_by_score_error(shape, kept):
    """The paper's loop, each candidate tried with a true rotation; with few tokens the sample is all of them."""
    kv_heads, _, pairs, _, _ = shape
    kept = min(kept, pairs)
    weights, moments, data = layer(shape)
    found = ROPE_CHOICES["elite"](moments, 2 * kept * kv_heads, expected_rotation=False)
    chosen = [[] for _ in range(kv_heads)]
    for _ in range(kept):
        for head in range(kv_heads):
            left = [pair for pair in range(pairs) if pair not in chosen[head]]
            tried = [[*chosen[:head], [*chosen[head], pair], *chosen[head + 1 :]] for pair in left]
            errors = [score_errors(data, weights, pairs, kept)[head] for kept in tried]
            chosen[head].append(left[errors.index(min(errors))])
    assert found.index.view(kv_heads, kept).tolist() == chosen


@fast
@given(shapes)
def test_no_single_pair_has_less_score_error_than_elites(shape):
    kv_heads, _, pairs, _, _ = shape
    weights, moments, data = layer(shape)
    errors = {
        name: score_errors(data, weights, pairs, choice.index.view(kv_heads, 1).tolist())
        for name in ("elite", "high", "low", "uniform", "two-norm")
        for choice in [ROPE_CHOICES[name](moments, 2 * kv_heads, expected_rotation=False)]
    }
    for name in ("high", "low", "uniform", "two-norm"):
        assert all(ours <= theirs + 1e-9 for ours, theirs in zip(errors["elite"], errors[name]))

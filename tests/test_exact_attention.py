"""Attention over exact and latent keys against its definition, and what is measured for it."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from anymla.methods.mla.moments import MomentSums
from anymla.modeling import exact_window
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.exact_window import ExactWindowAttention
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import LayerSpec


def close(a, b, tolerance=1e-9):
    return (a - b).abs().max().item() < tolerance


# --- The attention itself, against its definition


def attention(window, *, kv_heads=2, softcap=None, sinks=False):
    """An attention with random weights: 4 heads of 6 dims, 2 pairs of them turned, rank 5, 2 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=6, attn_implementation="eager"
    )
    sizes = {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": 6, "rope_pairs": 2, "scaling": 0.4}
    made = ExactWindowAttention(
        LlamaAttention(config, 0),
        config,
        LayerSpec(
            attention=AttentionSpec(**sizes, softcap=softcap, sinks=sinks),
            latent=LatentSpec(kv_lora_rank=5, qk_rope_head_dim=4, exact_window=window),
        ),
    ).double()
    for tensor in (*made.parameters(), made.query_rotation, made.channel_weight):
        tensor.data = torch.randn_like(tensor) * 0.4
    made.channel_index.copy_(torch.tensor([1, 0]))
    return made.eval().requires_grad_(False)


def turns(length):
    angles = torch.arange(length).double()[:, None] * torch.tensor([1.0, 0.3]).double()
    return angles.cos()[None].repeat(1, 1, 2), angles.sin()[None].repeat(1, 1, 2)


def by_definition(made, hidden, allowed):
    """softmax over j of the exact score where i - j < w and of the latent's where not, each with its own values."""
    cos, sin = (table[:, None, :, :2] for table in turns(hidden.shape[1]))
    query = made.true_query(hidden, None)
    nope, rope = made.queries(query, cos, sin)
    key, value = made.true_key(hidden), made.true_value(hidden)
    latent, rope_key = made.compress(hidden, cos, sin)
    far_key, far_value = made.expand_kv(latent, rope_key)

    def turned(heads):
        first, second, rest = heads.split([2, 2, 2], -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)

    def per_head(states):
        return states.repeat_interleave(4 // states.shape[1], dim=1)

    missing = torch.einsum("bhtd,hd->bht", nope, per_head(made.key_mean[None])[0])[..., None]
    exact = turned(query) @ per_head(turned(key)).mT - missing
    far = torch.cat([nope, rope], -1) @ per_head(far_key).mT
    place = torch.arange(hidden.shape[1])
    near = (place[:, None] - place) < made.exact_window
    scores = torch.where(near, exact, far) * made.scaling
    if (softcap := made.spec.softcap) is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~allowed, -torch.inf)
    if made.sinks is not None:
        scores = torch.cat([scores, made.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    share = scores.softmax(-1)[..., : len(place)]
    output = (share * near) @ per_head(value) + (share * ~near) @ per_head(far_value)
    return made.o_proj(output.transpose(1, 2).flatten(2))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 23),
    first=st.integers(0, 23),
    window=st.integers(2, 25),
    kv_heads=st.sampled_from([1, 2, 4]),
    softcap=st.sampled_from([None, 0.7]),
    sinks=st.booleans(),
    padding=st.integers(0, 5),
    block=st.sampled_from([3, 256]),
    absorbs=st.booleans(),
)
def test_every_chunk_gives_what_the_definition_says(
    length, first, window, kv_heads, softcap, sinks, padding, block, absorbs
):
    """Any split into a first chunk and single or several tokens behind it, by either form, under any padding."""
    made = attention(window, kv_heads=kv_heads, softcap=softcap, sinks=sinks)
    hidden = torch.randn(2, length, 24, dtype=torch.double, generator=torch.Generator().manual_seed(length))
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    allowed[1, :, :, : min(padding, length - 1)] = False
    allowed |= torch.eye(length, dtype=torch.bool)  # rows of padding see themselves
    expected, cache = by_definition(made, hidden, allowed), DynamicCache()
    cos, sin = turns(length)
    bounds = sorted({0, min(first, length), (min(first, length) + length) // 2, length})
    before = exact_window.BLOCK, ExactWindowAttention.absorbs
    exact_window.BLOCK, ExactWindowAttention.absorbs = block, lambda *_: absorbs
    try:
        parts = [
            made(
                hidden[:, start:stop],
                position_embeddings=(cos[:, start:stop], sin[:, start:stop]),
                attention_mask=allowed[:, :, start:stop, :stop],
                past_key_values=cache,
            )[0]
            for start, stop in pairwise(bounds)
        ]
    finally:
        exact_window.BLOCK, ExactWindowAttention.absorbs = before
    assert close(torch.cat(parts, 1), expected, 1e-12)
    exact = cache.layers[0].exact
    for held in (exact.keys, exact.values):
        assert held.shape[2] == min(length, window - 1)
        assert held.untyped_storage().nbytes() == held.numel() * 8  # and no more in memory


def test_gradients_reach_every_tensor_by_either_form(monkeypatch):
    for absorbs in (True, False):
        monkeypatch.setattr(ExactWindowAttention, "absorbs", lambda *_, absorbs=absorbs: absorbs)
        made = attention(4).requires_grad_(True)
        mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
        hidden = torch.randn(1, 9, 24, dtype=torch.double)
        made(hidden, position_embeddings=turns(9), attention_mask=mask)[0].square().sum().backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in made.parameters())


# --- What is measured for it


def test_moments_see_only_what_lies_beyond_the_window():
    weights = small_weights()
    query, key, value, cos, sin = small_batch(weights)
    window, length = 5, query.shape[2]
    sums = MomentSums(weights, window)
    sums.add(query, key, value, cos, sin, None)
    found = sums.moments()
    turn = torch.complex(cos[0, 0], sin[0, 0])
    rotation, mass = torch.zeros(2, 2, dtype=torch.complex128), torch.zeros(2, dtype=torch.float64)
    received, key_weight, value_weight = torch.zeros(2, length).double(), torch.zeros(2).double(), torch.zeros(2)
    value_weight = value_weight.double()
    for batch in range(2):
        for head in range(2):
            pairs = torch.view_as_complex(torch.stack([query[batch, head, :, :2], query[batch, head, :, 2:4]], -1))
            keys = torch.view_as_complex(torch.stack([key[batch, 0, :, :2], key[batch, 0, :, 2:4]], -1))
            scores = ((pairs * turn)[:, None] * (keys * turn).conj()).real.sum(-1)
            scores = (scores + query[batch, head, :, 4:] @ key[batch, 0, :, 4:].T) * weights.scaling
            share = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
            output = share @ value[batch, 0]
            for m in range(length):
                for n in range(m - window + 1):
                    rotation[head] += share[m, n] * turn[m] * turn[n].conj()
                    mass[head] += share[m, n]
                    received[batch, n] += share[m, n] ** 2
                    lost = weights.output[:, head] @ (value[batch, 0, n] - output[m])
                    key_weight[head] += share[m, n] ** 2 * lost @ lost
                    value_weight[head] += share[m, n] ** 2
    tokens = 2 * length
    assert close(found.rotation, rotation / mass[:, None], 1e-10)
    assert close(found.key_weight, key_weight / tokens, 1e-10)
    assert close(found.value_weight, value_weight / tokens, 1e-10)
    y = torch.cat([key[:, 0], value[:, 0]], -1)
    weighted = torch.einsum("bn,bni->i", received, y) / received.sum()
    assert close(found.weighted_mean, weighted, 1e-10)


def small_weights():
    from anymla.architectures.attention import AttentionWeights

    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=random)

    biases = {"query_bias": draw(2, 5), "key_bias": draw(1, 5), "value_bias": draw(1, 5), "output_bias": draw(8)}
    sizes = {"query": draw(2, 5, 8), "key": draw(1, 5, 8), "value": draw(1, 5, 8), "output": draw(8, 2, 5)}
    return AttentionWeights(
        **sizes, **biases, rope_pairs=2, scaling=0.4, key_gain=torch.ones(1, 5, dtype=torch.float64)
    )


def small_batch(weights):
    random = torch.Generator().manual_seed(2)
    shapes = [(2, 2, 14, 5), (2, 1, 14, 5), (2, 1, 14, 5)]
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes)
    angles = torch.arange(14).double()[:, None] * torch.tensor([1.0, 0.2]).double()
    return query, key, value, angles.cos()[None, None], angles.sin()[None, None]

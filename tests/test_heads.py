"""What families do to heads and scores: temperature, masks, position biases; and that gradients flow through it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from anymla.modeling.attention_spec import AttentionSpec, Temperature
from anymla.modeling.heads import attention_weights, causal_mask, query_temperature, score_bias
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.spec import LayerSpec

fast = settings(max_examples=25, deadline=None)


@fast
@given(st.integers(1, 9), st.integers(0, 9), st.none() | st.integers(1, 12))
def test_causal_mask_is_what_it_says(new, before, window):
    mask = causal_mask(new, before + new, window, "cpu")
    assert mask.shape == (1, 1, new, before + new)
    for row in range(new):
        for column in range(before + new):
            distance = before + row - column
            assert mask[0, 0, row, column].item() == (distance >= 0 and (window is None or distance < window))


@fast
@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=5),
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([8, 8192]),
)
def test_query_temperature_is_its_formula(positions, scale, offset, period):
    found = query_temperature(torch.tensor([positions]), Temperature(scale=scale, offset=offset, period=period))
    assert found.shape == (1, 1, len(positions), 1)
    for value, position in zip(found.flatten().tolist(), positions, strict=True):
        assert value == pytest.approx(1 + scale * math.log(1 + math.floor((position + offset) / period)))


def test_query_temperature_steps_where_llama_4_steps():
    llama4 = Temperature(scale=0.1, offset=1.0, period=8192)
    found = query_temperature(torch.tensor([[0, 8190, 8191]]), llama4).flatten().tolist()
    assert found == pytest.approx([1, 1, 1 + 0.1 * math.log(2)])


@fast
@given(st.integers(0, 100), st.none() | st.floats(0.5, 4), st.booleans(), st.booleans())
def test_attention_weights_are_a_softmax_with_one_more_logit(seed, softcap, masked, with_sinks):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 4, 6, generator=random, dtype=torch.float64) * 3
    sinks = torch.randn(3, generator=random, dtype=torch.float64) if with_sinks else None
    mask = torch.randn(1, 3, 4, 6, generator=random, dtype=torch.float64) if masked else None
    capped = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    exponents = (capped if mask is None else capped + mask).exp()
    total = exponents.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    assert torch.allclose(attention_weights(scores, mask, softcap, sinks), exponents / total)
    half = attention_weights(scores.bfloat16(), mask, softcap, sinks).double()
    assert (half - exponents / total).abs().max() < 0.1


LOWEST = torch.finfo(torch.float64).min / 2


def bias_of(mask, kind, length=6, implementation="sdpa", new=3, **inputs):
    sizes = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "rope_pairs": 0}
    spec = AttentionSpec(**sizes, position_bias=kind, local_window=2, scaling=0.25)
    config = SimpleNamespace(_attn_implementation=implementation)
    result = score_bias(mask, spec, config, torch.zeros(2, new, 8, dtype=torch.float64), length, inputs)
    assert not inputs  # what is left of them goes to the attention kernels, which do not know these
    return result


def test_without_a_bias_the_mask_stays_itself():
    mask = causal_mask(3, 6, None, "cpu")
    assert bias_of(None, None) is None
    assert bias_of(mask, None) is mask
    assert bias_of(mask, None, alibi=None, position_bias=None) is mask
    assert bias_of(mask, "scaled-alibi", alibi=torch.ones(8, 1, 6)) is mask  # Falcon's mask holds it already


@pytest.mark.parametrize(("kind", "factor"), [("alibi", 1.0), ("scaled-alibi", 0.25)])
@pytest.mark.parametrize("masked", [True, False])
def test_alibi_by_sequence_and_head(kind, factor, masked):
    alibi = torch.randn(8, 1, 6, dtype=torch.float64)
    allowed = causal_mask(3, 6, None, "cpu").expand(2, 1, 3, 6)
    found = bias_of(allowed if masked else None, kind, implementation="eager", alibi=alibi)
    for sequence in range(2):
        for head in range(4):
            expected = alibi[4 * sequence + head] * factor
            rows = found[sequence, head]
            if not masked:
                assert torch.equal(rows, expected)
                continue
            assert torch.allclose(rows[allowed[0, 0]], expected.expand(3, 6)[allowed[0, 0]])
            assert (rows[~allowed[0, 0]] < LOWEST / 2).all()


def test_mpt_bias_is_of_the_last_tokens_and_its_mask_says_what_is_hidden():
    slopes = torch.randn(4, 1, 32, dtype=torch.float64)
    allowed = causal_mask(3, 6, None, "cpu")
    found = bias_of(~allowed, "mpt", position_bias=slopes)
    assert found.shape == (1, 4, 3, 6)
    expected = slopes[:, :, -6:].expand(4, 3, 6)
    assert torch.allclose(found[0][allowed[0].expand(4, 3, 6)], expected[allowed[0].expand(4, 3, 6)])
    assert (found[0][~allowed[0].expand(4, 3, 6)] < LOWEST / 2).all()
    assert torch.equal(bias_of(None, "mpt", new=1, position_bias=slopes), slopes[None, :, :, -6:])


@pytest.mark.parametrize("masked", [True, False])
def test_local_window_joins_the_mask(masked):
    found = bias_of(causal_mask(3, 6, None, "cpu") if masked else None, "window")
    assert torch.equal(found == 0, causal_mask(3, 6, 2, "cpu"))
    assert torch.isfinite(found).all()  # two masks on one score do not overflow


FEATURES = {
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "gate per number": {"gate": 32},
    "gate per head": {"gate": 4, "gate_activation": "softplus"},
    "all": {"softcap": 0.7, "sinks": True, "gate": 32, "query_gain": True},
}


def random_attention(**features):
    """Latent attention with weights far from their trivial start, in training."""
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, attn_implementation="eager")
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_pairs": 3, "scaling": 0.35}
    latent = LatentSpec(kv_lora_rank=10, qk_rope_head_dim=6, biases=False)
    torch.manual_seed(0)
    spec = LayerSpec(attention=AttentionSpec(**sizes, **features), latent=latent)
    attention = LatentAttention(SimpleNamespace(layer_idx=0), config, spec)
    for tensor in (*attention.parameters(), attention.channel_weight, attention.query_rotation):
        tensor.data = torch.randn_like(tensor) * 0.5
    attention.channel_index.copy_(torch.tensor([0, 2, 2]))
    return attention.double().train()


def loss_of(attention, hidden, mask):
    angle = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    output, _ = attention(hidden, position_embeddings=(angle.cos()[None], angle.sin()[None]), attention_mask=mask)
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


@pytest.mark.parametrize("features", FEATURES)
def test_gradients_flow_in_training(monkeypatch, features):
    """By the latent and by expansion alike, to every weight, and as the numbers themselves say."""
    attention = random_attention(**FEATURES[features])
    hidden = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    wanted = {"hidden": hidden} | dict(attention.named_parameters())
    found = {}
    for absorbs, mask in ((True, causal_mask(5, 5, None, "cpu")), (False, causal_mask(5, 5, None, "cpu"))):
        monkeypatch.setattr(LatentAttention, "absorbs", lambda *_, absorbs=absorbs: absorbs)
        if not absorbs and attention.spec.softcap is None and attention.sinks is None:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, LOWEST)  # eager adds its mask
        loss = loss_of(attention, hidden, mask)
        found[absorbs] = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    for name, absorbed in found[True].items():
        assert absorbed.abs().max() > 1e-3, name
        # eager takes its softmax in float32
        assert torch.allclose(absorbed, found[False][name], atol=1e-4 * absorbed.abs().max().item(), rtol=1e-3), name
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: True)
    direction = {name: torch.randn_like(tensor) for name, tensor in wanted.items()}
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):  # a step ahead, then one as far behind
            for name, tensor in wanted.items():
                tensor += step * direction[name]
            ends.append(loss_of(attention, hidden, causal_mask(5, 5, None, "cpu")).item())
    slope = sum((found[True][name] * direction[name]).sum().item() for name in wanted)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_dropout_of_weights_keeps_to_training():
    """With dropout the weights must exist: training expands, and evaluation is what it is without."""
    attention = random_attention(softcap=0.7, sinks=True)
    attention.attention_dropout = 0.5
    hidden, mask = torch.randn(2, 5, 24, dtype=torch.float64), causal_mask(5, 5, None, "cpu")
    assert not attention.absorbs(1, None)
    assert loss_of(attention, hidden, mask).item() != loss_of(attention, hidden, mask).item()
    attention.eval()
    assert attention.absorbs(1, None)
    assert loss_of(attention, hidden, mask).item() == loss_of(attention, hidden, mask).item()

"""Absorbed attention equals plain attention over the expanded cache, in every dtype and by every path."""

from __future__ import annotations

import pytest
import torch

from anymla.modeling import absorbed
from anymla.modeling.latent_attention import LatentAttention


def absorbed_attention(*inputs, **features):
    return absorbed.absorbed_attention(*inputs, **features)[0]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def reference(query_latent, query_rope, latent, rope_key, mask, scale, softcap=None, sinks=None):
    scores = torch.einsum("bhtr,bsr->bhts", query_latent.double(), latent[:, 0].double())
    scores = scores + torch.einsum("bhtr,bsr->bhts", query_rope.double(), rope_key[:, 0].double())
    scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = scores.exp()  # scores of these tests are small
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.einsum("bhts,bsr->bhtr", weights / total, latent[:, 0].double())


def inputs(dtype, new, cached, rope, batch=2, heads=4, rank=24):
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, new, rank), (batch, heads, new, rope), (batch, 1, cached, rank), (batch, 1, cached, rope)]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def masks(kind, dtype, new, cached, batch=2):
    allowed = torch.ones(batch, 1, new, cached, dtype=torch.bool).tril(cached - new)
    allowed[1, :, :, : cached // 3] = False
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    alibi = torch.arange(-cached, 0)[None, None, None] * torch.tensor([0.5, 0.1, 0.02, 0.001])[None, :, None, None]
    per_head = alibi.to(dtype) + torch.zeros(1, 1, new, cached, dtype=dtype).masked_fill(
        ~allowed[:1], torch.finfo(dtype).min / 2
    )
    masks = {"none": None, "bool": allowed, "additive": additive, "shared": allowed[:1], "per-head": per_head}
    return masks[kind]


def force(monkeypatch, path):
    """Lets float32 go by one of the three paths; other dtypes always take the plain one."""
    sizes = {"plain": (1 << 40, 1 << 40), "tall": (0, 1 << 40), "stream": (0, 0)}[path]
    monkeypatch.setattr(absorbed, "TALL_SIZE", sizes[0])
    monkeypatch.setattr(absorbed, "STREAM_SIZE", sizes[1])


@pytest.mark.parametrize("path", ["plain", "tall", "stream"])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "shared", "per-head"])
@pytest.mark.parametrize("rope", [0, 6])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_absorbed_equals_reference(monkeypatch, dtype, new, rope, mask, path):
    force(monkeypatch, path)
    cached = 301
    tensors, allowed = inputs(dtype, new, cached, rope), masks(mask, dtype, new, cached)
    expected = reference(*tensors, allowed, 0.3)
    result = absorbed_attention(*tensors, allowed, 0.3)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() < TOLERANCE[dtype] * max(1, expected.abs().max())


EXTRAS = {"softcap": {"softcap": 0.8}, "sinks": {"sinks": True}, "both": {"softcap": 0.8, "sinks": True}}
# float32 by every path; the others have one
DTYPE_PATHS = [(torch.float32, "plain"), (torch.float32, "tall"), (torch.float32, "stream")]
DTYPE_PATHS += [(dtype, "plain") for dtype in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("dtype", "path"), DTYPE_PATHS, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "per-head"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("new", "rope"), [(1, 6), (3, 6), (3, 0)])
def test_softcap_and_sinks_equal_reference(monkeypatch, new, rope, extra, mask, dtype, path):
    force(monkeypatch, path)
    cached, options = 301, dict(EXTRAS[extra])
    if "sinks" in options:
        options["sinks"] = torch.tensor([-2.0, 0.5, 3.0, 6.0], dtype=dtype)
    tensors, allowed = inputs(dtype, new, cached, rope), masks(mask, dtype, new, cached)
    expected = reference(*tensors, allowed, 0.3, **options)
    result = absorbed_attention(*tensors, allowed, 0.3, **options)
    assert (result.double() - expected).abs().max() < TOLERANCE[dtype] * max(1, expected.abs().max())
    plain = reference(*tensors, allowed, 0.3)
    assert (expected - plain).abs().max() > 0.03  # the feature does something


@pytest.mark.parametrize(("dtype", "path"), DTYPE_PATHS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_logarithm_of_the_total(monkeypatch, sinks, dtype, path):
    """Attention to two halves of the tokens, each with its share, is attention to all of them."""
    force(monkeypatch, path)
    (query, rope, latent, keys), new = inputs(dtype, 3, 602, 6), 301
    sink = torch.tensor([-2.0, 0.5, 3.0, 6.0], dtype=dtype) if sinks else None
    whole = absorbed_attention(query, rope, latent, keys, None, 0.3, sinks=sink)
    first, one = absorbed.absorbed_attention(
        query, rope, latent[:, :, :new], keys[:, :, :new], None, 0.3, summed=True, sinks=sink
    )
    second, two = absorbed.absorbed_attention(query, rope, latent[:, :, new:], keys[:, :, new:], None, 0.3, summed=True)
    share = torch.sigmoid(one.double() - two.double())[..., None]
    merged = share * first.double() + (1 - share) * second.double()
    assert (merged - whole.double()).abs().max() < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("path", ["plain", "tall", "stream"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_gradients_by_every_path(monkeypatch, extra, path):
    """Products and softmax are done in place: what autograd keeps must not be among what they overwrite."""
    force(monkeypatch, path)
    tensors = [tensor.requires_grad_() for tensor in inputs(torch.float32, 3, 301, 6)]
    options = dict(EXTRAS[extra])
    if "sinks" in options:
        options["sinks"] = torch.tensor([-2.0, 0.5, 3.0, 6.0], requires_grad=True)
        tensors.append(options["sinks"])
    mask = masks("per-head", torch.float32, 3, 301)
    towards = torch.randn(2, 4, 3, 24, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((reference(*tensors[:4], mask, 0.3, **options) * towards).sum(), tensors)
    found = torch.autograd.grad((absorbed_attention(*tensors[:4], mask, 0.3, **options) * towards).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        assert torch.allclose(one, other, atol=1e-4 * other.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("path", ["plain", "tall", "stream"])
def test_all_attention_goes_to_the_sink_where_all_is_masked(monkeypatch, path):
    force(monkeypatch, path)
    mask = torch.zeros(2, 1, 2, 301, dtype=torch.bool)
    context = absorbed_attention(*inputs(torch.float32, 2, 301, 4), mask, 1.0, sinks=torch.zeros(4))
    assert torch.equal(context, torch.zeros_like(context))


@pytest.mark.parametrize("path", ["plain", "tall", "stream"])
def test_sink_far_above_the_scores_does_not_overflow(monkeypatch, path):
    force(monkeypatch, path)
    sinks = torch.full((4,), 300.0, requires_grad=True)
    context = absorbed_attention(*inputs(torch.float32, 1, 301, 4), None, 0.3, sinks=sinks)
    assert context.abs().max() < 1e-6
    assert torch.isfinite(torch.autograd.grad(context.sum(), sinks)[0]).all()  # where an infinite sum would show


def test_fully_masked_rows_stay_finite():
    tensors = inputs(torch.float32, 2, 40, 4)
    mask = torch.zeros(2, 1, 2, 40, dtype=torch.bool)
    assert torch.isfinite(absorbed_attention(*tensors, mask, 1.0)).all()


def test_static_cache_view_is_read_in_place():
    tensors = inputs(torch.float32, 1, 64, 4)
    buffer = torch.randn(2, 1, 128, 24)
    buffer[:, :, :64] = tensors[2]
    sliced = absorbed_attention(tensors[0], tensors[1], buffer[:, :, :64], tensors[3], None, 0.5)
    assert torch.allclose(sliced, absorbed_attention(*tensors, None, 0.5), atol=1e-6)


def test_absorbed_equals_expanded_on_the_trained_model(converted):
    attention: LatentAttention = converted.model.layers[2].self_attn
    random = torch.Generator().manual_seed(3)
    rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    shapes = [(2, 8, 1, 8), (2, 8, 1, rope), (2, 1, 50, rank), (2, 1, 50, rope)]
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    with torch.no_grad():
        expanded, _ = attention.attend_expanded(*tensors, None)
        absorbed = attention.attend_absorbed(*tensors, None, attention.up_projections(tensors[0]))
    assert (expanded - absorbed).abs().max() < 1e-4


def test_counts_decide_between_the_paths(converted):
    attention: LatentAttention = converted.model.layers[0].self_attn
    mask = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    assert attention.absorbs(1, None)
    assert attention.absorbs(1, mask)
    assert not attention.absorbs(2, None)  # several tokens and no mask: a plain causal prefill
    heads, kv_heads, d, rank = 8, 4, 8, attention.kv_lora_rank
    even = kv_heads * d * rank / (heads * (rank - d)) if rank > d else float("inf")
    many = torch.ones(1, 1, 500, 500, dtype=torch.bool)
    assert attention.absorbs(500, many) == (even > 500)

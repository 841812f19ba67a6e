"""MHA2MLA (arXiv 2502.14837), checked against a dense reference written from its formulae alone.

The reference masks RoPE (dims outside S keep their value at position 0) and replaces [W_k,nope ; W_v] by its truncated
SVD; it shares no code with the package.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from tests.families import FAST, logits, make_model, save_model, token_ids

HEADS, KV_HEADS, HEAD_DIM, PAIRS = 6, 3, 8, 4
RANK = 9


def kept_pairs(strategy, model, ids, kept):
    """Indices of the rotated pairs of every kv head in every layer, [layers][G][kept]."""
    fixed = {
        "high": list(range(kept)),
        "low": list(range(PAIRS - kept, PAIRS)),
        "uniform": [i * PAIRS // kept for i in range(kept)],
    }
    if strategy in fixed:
        return [[fixed[strategy]] * KV_HEADS for _ in model.model.layers]
    return [two_norm(layer, states, kept) for layer, states in zip(model.model.layers, attention_inputs(model, ids))]


def attention_inputs(model, ids):
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def two_norm(layer, states, kept):
    """score[g, i] = sum over the query heads of g of E||q_i|| E||k_i||, the norms taken before RoPE."""
    attention = layer.self_attn

    def norms(linear):
        x = linear(states).unflatten(-1, (-1, HEAD_DIM))
        return (x[..., :PAIRS].square() + x[..., PAIRS:].square()).sqrt().mean((0, 1))

    query, key = norms(attention.q_proj), norms(attention.k_proj)
    score = query.view(KV_HEADS, -1, PAIRS).sum(1) * key
    return score.argsort(dim=1, descending=True)[:, :kept].tolist()


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def dense_attention(layer, states, inverse_frequency, pairs, svd):
    """MHA2MLA's attention, dense: [B,T,D] to [B,T,D]."""
    attention, (batch, length, _) = layer.self_attn, states.shape
    rotated = torch.zeros(KV_HEADS, HEAD_DIM, dtype=torch.bool)
    for head, chosen in enumerate(pairs):
        for pair in chosen:
            rotated[head, [pair, pair + PAIRS]] = True
    key_weight, value_weight = attention.k_proj.weight.clone(), attention.v_proj.weight.clone()
    nope = ~rotated.flatten()
    if svd == "joint-svd":
        low = truncated(torch.cat([key_weight[nope], value_weight]), RANK)
        key_weight[nope], value_weight = low[: nope.sum()], low[nope.sum() :]
    else:
        key_weight[nope] = truncated(key_weight[nope], RANK // 2)
        value_weight = truncated(value_weight, RANK - RANK // 2)
    query = attention.q_proj(states).view(batch, length, HEADS, HEAD_DIM)
    key, value = states @ key_weight.T, states @ value_weight.T
    if attention.k_proj.bias is not None:  # biases stay outside the SVD
        key, value = key + attention.k_proj.bias, value + attention.v_proj.bias
    key = key.view(batch, length, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, 2)
    value = value.view(batch, length, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, 2)
    mask = rotated.repeat_interleave(HEADS // KV_HEADS, 0)
    angle = torch.arange(length, dtype=states.dtype)[:, None] * inverse_frequency.to(states.dtype)
    cos = torch.where(mask, torch.cat([angle.cos()] * 2, -1)[:, None], 1.0)
    sin = torch.where(mask, torch.cat([angle.sin()] * 2, -1)[:, None], 0.0)

    def turn(x):
        return x * cos + torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1) * sin

    scores = torch.einsum("bthd,bshd->bhts", turn(query), turn(key)) / HEAD_DIM**0.5
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(causal, -torch.inf).softmax(-1)
    return attention.o_proj(torch.einsum("bhts,bshd->bthd", weights, value).flatten(2))


@torch.no_grad()
def dense_logits(model, ids, pairs, svd):
    hidden = model.model.embed_tokens(ids)
    for layer, chosen in zip(model.model.layers, pairs):
        frequency = model.model.rotary_emb.inv_freq
        hidden = hidden + dense_attention(layer, layer.input_layernorm(hidden), frequency, chosen, svd)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("svd", ["joint-svd", "split-svd"])
@pytest.mark.parametrize("strategy", ["high", "low", "uniform", "two-norm"])
@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_is_the_papers_function(tmp_path, family, strategy, svd, kept):
    model = make_model(family, torch.float64, head_dim=HEAD_DIM)
    source = save_model(model, tmp_path / "source")
    settings = {"rope": strategy, "factorization": svd, "expected_rotation": False}
    anymla.convert(source, tmp_path / "out", rope_dims=2 * kept, kv_rank=RANK, **settings, **FAST)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    pairs = kept_pairs(strategy, model, calibration_ids(source), kept)
    ids = token_ids()
    expected = dense_logits(model, ids, pairs, svd)
    assert (expected - logits(model, ids)).abs().max() > 0.1  # the paper's function is not the original
    assert (logits(converted, ids) - expected).abs().max() < 1e-5


def calibration_ids(source):
    """The windows that the conversion takes its statistics from."""
    from anymla.data.text import bundled_text, calibration_windows
    from anymla.io.checkpoint import load_tokenizer
    from anymla.sweep.layer import CalibrationSplit

    tokens, length = FAST["calibration_tokens"], FAST["calibration_length"]
    windows = calibration_windows(bundled_text("train"), load_tokenizer(source), tokens=tokens, length=length, seed=0)
    return windows[CalibrationSplit.of(len(windows)).fit]

"""The benchmark of bytes: codecs of other systems, what queries read of them, bytes, and the aims' arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from anymla.demo import bundled_model
from anymla.io.checkpoint import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bytes as bytes_benchmark
import bytes_page
from bytes_systems import CodedLatent, sized
from cache_baselines import (
    CareLatents,
    Codec,
    HadamardInt,
    Kivi,
    PlainPCA,
    Tables,
    allocated_bits,
    hadamard,
    levels_of,
    nearest_level,
)
from simulation import observed, simulated


@pytest.fixture(scope="module")
def model():
    return load_model(bundled_model())


IDS = torch.randint(5, 400, (2, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, codec=None):
    if codec is None:
        return model(IDS, use_cache=False).logits
    with simulated(model, codec):
        return model(IDS, use_cache=False).logits


def test_a_simulation_that_keeps_all_is_the_original(model):
    for before_rope in (True, False):
        assert (logits(model, Codec(before_rope=before_rope)) - logits(model)).abs().max() < 1e-4
    assert model.config._attn_implementation != "simulated"


def test_queries_read_exact_tokens_exactly(model):
    """With all tokens first or recent nothing is lost; with fewer, only later queries lose."""

    class Lost(Codec):
        def decoded(self, layer, keys, values):
            return torch.zeros_like(keys), torch.zeros_like(values)

    expected = logits(model)
    for codec in (Lost(first=64), Lost(recent=64)):
        assert (logits(model, codec) - expected).abs().max() < 1e-4
    lossy = (logits(model, Lost(recent=16)) - expected).abs().amax((0, 2))
    assert lossy[:16].max() < 1e-4 < lossy[16:].min()


@pytest.mark.parametrize("kind", [Tables, PlainPCA, CareLatents])
def test_fitted_codecs_lose_less_with_more_bits(model, kind):
    samples = observed(model, IDS, before_rope=True)
    losses = []
    for bits in (1, 3, 6):
        codec = kind(key_bits=bits, value_bits=bits) if kind is Tables else kind(bits=bits)
        if kind is CareLatents:
            codec.share = 1.0
        codec.fit(samples)
        losses.append((logits(model, codec) - logits(model)).square().mean().item())
    assert losses[0] > 2 * losses[1] > 8 * losses[2], losses


def test_grids_of_integers():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 64, 32, generator=generator)
    turn = hadamard(8)
    assert torch.allclose(turn @ turn.T, torch.eye(8), atol=1e-6)
    for codec in (Kivi(bits=8), HadamardInt(bits=8, head_dim=8)):
        for exact, read in zip((keys, values), codec.decoded(0, keys, values)):
            assert 1e-5 < (exact - read).abs().max() < 0.03
    key, value = Kivi(group=32).is_exact(64)
    assert key[40].nonzero()[:, 0].tolist()[:32] == list(range(32, 64))
    assert value[40].nonzero()[0, 0] == 9


def test_levels_and_bits():
    samples = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 4.0, 0.1])
    error = (nearest_level(samples, levels_of(samples, 2)) - samples).var(0) / samples.var(0)
    assert torch.allclose(error, torch.full((3,), 0.1175), atol=0.01)
    bits = allocated_bits(samples.var(0), 6)
    assert bits.tolist() == [2, 4, 0]


def test_bytes_are_counted_whole():
    """Keys and values of 32 numbers: codes, a scale and a zero point of 16 bits per group."""
    assert Tables(key_bits=3, value_bits=2).code_bits(32) == 160
    assert Kivi(bits=2).code_bits(32) == 2 * (64 + 32)
    assert HadamardInt(bits=4, head_dim=32).code_bits(64) == 2 * 2 * (32 * 4 + 32)
    assert CareLatents(share=0.5, bits=4).code_bits(32) == 2 * 16 * 4

    class Bench:
        token_bytes = 128
        protocol = type("Protocol", (), {"length": 64})

    assert sized(Bench, 32.0, 4 * 96.0)["share"] == (32 + 6) / 128


@torch.no_grad()
def test_latents_are_coded_before_rope():
    class Attention:
        channel_frequency = torch.tensor([0])

        def compress(self, hidden, cos, sin):
            key = hidden[..., 4:].unsqueeze(1)
            real, imag = key.chunk(2, dim=-1)
            return hidden[..., :4].unsqueeze(1), torch.cat([real * cos - imag * sin, real * sin + imag * cos], -1)

    hidden, angle = torch.randn(1, 32, 6), torch.randn(1, 1, 32, 1)
    attention = Attention()
    exact, coded = attention.compress(hidden, angle.cos(), angle.sin()), CodedLatent(attention, 8)
    for fitted, most in ((False, 1e-6), (True, 0.2)):
        if fitted:
            coded.fit()
        for expected, read in zip(exact, coded(hidden, angle.cos(), angle.sin())):
            assert (expected - read).abs().max() < most
            assert (expected - read)[:, :, :4].abs().max() < 1e-6


def row(system, share, kl, case="0.25", **more):
    quality = {"perplexity": 10.0, "top1_agreement": 0.9, "bytes_per_token": 10, "seconds": 1.0}
    known = {"model": "SmolLM2", "protocol": PROTOCOL, "original": {"perplexity": 9.9, "bytes": 100}}
    return known | quality | {"system": system, "case": case, "share": share, "kl": kl, "texts": {"a": {}}} | more


KEYS = ("model", "system", "case", "protocol", "original")
PROTOCOL = {"text": ["t"], "held_out": ["a"], "calibration_tokens": 512, "windows": 2, "length": 64}


def test_other_systems_are_read_at_our_bytes():
    points = [(0.1, 1.0), (0.2, 2.0), (0.4, 0.01)]  # the second has more bytes and more KL: it does not count
    assert bytes_page.at_bytes(points, 0.2) == pytest.approx(0.1)
    assert bytes_page.at_bytes(points, 0.5) == 0.01
    assert bytes_page.at_bytes(points, 0.05) is None


def test_page_says_how_far_aims_are(tmp_path):
    rows = [row("anymla", 0.25, 0.03), row("KIVI-like", 0.25, 0.05, "4 bits"), row("CARE", 0.2, 0.4, "0.5")]
    systems = ["anymla", "KIVI-like", "CARE"]
    bytes_page.write_page(tmp_path / "bytes.md", rows, systems)
    bytes_page.plot(tmp_path / "bytes.png", rows, systems)
    text = (tmp_path / "bytes.md").read_text()
    assert "0.0300 | 0.0500 (KIVI-like) | 0.60 (aim 0.33) | +1.0% (aim +0.5%)" in text
    assert (tmp_path / "bytes.png").stat().st_size > 1000


def test_rows_are_measured_once(monkeypatch, tmp_path):
    calls, scores = (
        [],
        {name: value for name, value in row("", 0.5, 0.1).items() if name not in KEYS},
    )
    monkeypatch.setattr(bytes_benchmark, "measured", lambda *job: calls.append(job) or scores)
    run = [
        "bytes.py",
        "-o",
        str(tmp_path),
        "--windows",
        "1",
        "--length",
        "64",
        "--only",
        "KIVI-like: 4",
        "NUQ tables: K 2",
    ]
    for again, count in (([], 3), ([], 3), (["--again"], 6)):
        monkeypatch.setattr(sys, "argv", [*run, "--calibration-tokens", "1024", *again])
        bytes_benchmark.main()
        assert len(calls) == count

"""Tables of levels: as good as known best quantisers, weighted, deterministic, whatever the numbers are."""

from __future__ import annotations

import time

import pytest
import torch

from anymla.methods.cache_coding.tables import TableSample, with_farther

MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000642, 8: 4.1e-5}  # (Max, 1960, table I)


def gaussian(tokens=8192, width=8, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(numbers, levels):
    """Squared errors [N,C], by trying every level."""
    return (numbers[:, :, None] - levels).square().amin(-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_levels_of_a_gaussian_are_lloyd_and_max(bits):
    """On numbers that they were not fitted to, within a few per cent of Max's table; tails cost more at 8 bits."""
    numbers, levels = gaussian(seed=1) * 3 + 5, TableSample(gaussian() * 3 + 5).fit(bits)
    assert levels.shape == (8, 2**bits) and (levels.diff() >= 0).all()
    error = nearest(numbers, levels).mean() / 9
    assert error == pytest.approx(MAX[bits], rel=0.04 if bits < 5 else 0.1 if bits < 8 else 1)


def test_weights_draw_the_levels():
    numbers = gaussian()
    weights = (numbers > 0).double() * 100 + 1
    plain, weighted = TableSample(numbers).fit(2), TableSample(numbers, weights).fit(2)
    lost, of_plain = ((nearest(numbers, levels) * weights).sum(0) for levels in (weighted, plain))
    assert (lost < 0.6 * of_plain).all()
    left_out = TableSample(numbers, (numbers.abs() < 1).double()).fit(2)
    torch.testing.assert_close(left_out[:, :1], TableSample(numbers.clamp(-1, 1)).fit(2)[:, :1], rtol=0.3, atol=0)
    assert (left_out.abs() < 1).all()


@pytest.mark.parametrize(("bits", "outside", "inside"), [(2, 1, 1.01), (4, 0.4, 1.4), (6, 0.05, 1.5), (8, 0.01, 1.5)])
def test_many_levels_reach_farther_than_the_sample(bits, outside, inside):
    """A number twice as far out as any of the sample: more bits help it, and those inside lose little by that."""
    numbers, far = gaussian().clamp(-3, 3), torch.full((1, 8), 6.0, dtype=torch.float64)
    plain = TableSample(numbers).fit(bits)
    reaching = TableSample(*with_farther(numbers, torch.ones_like(numbers))).fit(bits)
    assert nearest(far, reaching).mean() < outside * nearest(far, plain).mean()
    assert nearest(numbers, reaching).mean() < inside * nearest(numbers, plain).mean()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_few_and_equal_numbers(bits):
    """Constants, two values, fewer tokens than levels, no weight at all: finite, sorted, nothing lost."""
    numbers = torch.zeros(5, 4)
    numbers[:, 1], numbers[2:, 2], numbers[:, 3] = 1e30, 7.0, torch.arange(5)
    for weights in (None, torch.ones(5, 1), torch.zeros(5, 1)):
        sample = TableSample(numbers, weights)
        levels = sample.fit(bits)
        assert levels.isfinite().all() and (levels.diff() >= 0).all()
        if weights is None:
            assert nearest(numbers.double(), levels)[:, :3].sum() == 0


def test_fast_and_deterministic():
    numbers = gaussian(width=192).float()
    start = time.process_time()
    first = TableSample(numbers).fit(4)
    assert time.process_time() - start < 5  # well under one on an idle core
    assert torch.equal(first, TableSample(numbers).fit(4))

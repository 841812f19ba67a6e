"""Codecs: packed exactly, counted exactly, and as near as their levels allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymla.modeling.codec import pack, unpack
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import WIDTHS, Coding
from anymla.modeling.room import Room

GRIDS = {
    "int8": Coding(bits=((8, 13),), kind="int", block=5),
    "int4": Coding(bits=((4, 6), (4, 7)), kind="int"),
    "fp8": Coding(bits=((8, 13),), kind="fp8", block=6),
}
codings = st.builds(
    Coding,
    bits=st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(1, 9)), min_size=1, max_size=7).map(tuple),
    token_scale=st.booleans(),
    outliers=st.just(0),
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table_codec(coding, seed=0):
    """A codec with random levels, and these levels of each coefficient (None where it has none)."""
    codec = make_codec(coding)
    tables = {
        bits: random(count, 2**bits, seed=seed + bits).sort(-1).values
        for bits, count in coding.counts.items()
        if 0 < bits < 16
    }
    codec.set_tables(tables)
    rows = {bits: iter(table) for bits, table in tables.items()}
    return codec, [next(rows[bits]) if bits in rows else None for bits, count in coding.bits for _ in range(count)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_words_are_packed_without_gaps(bits):
    for count in (1, 3, 8, 17):
        words = torch.randint(0, 2**bits, (2, 3, count), dtype=torch.uint8)
        packed = pack(words, bits)
        assert packed.shape == (2, 3, -(-count * bits // 8))
        assert torch.equal(unpack(packed.flatten(0, 1).T, bits, Room())[:count].T, words.flatten(0, 1))


@given(codings, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_every_coefficient_is_read_as_its_nearest_level(coding, seed):
    codec, levels = table_codec(coding, seed)
    x = random(2, 3, coding.width, seed=seed)
    rows = codec.encode(x)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, coding.row_bytes)
    assert codec.levels.numel() == coding.table_numbers
    zero, scale = torch.zeros(2, 3), torch.ones(2, 3)
    if coding.token_scale:
        zero, scale = (each.half().float() for each in ((x.amax(-1) + x.amin(-1)) / 2, (x.amax(-1) - x.amin(-1)) / 2))
    widths = [bits for bits, count in coding.bits for _ in range(count)]
    for place, (bits, level) in enumerate(zip(widths, levels)):
        found, number = codec.decode(rows, torch.float32)[..., place], x[..., place]
        if level is None:
            assert torch.equal(found, number.half().float() if bits else torch.zeros(2, 3))
        else:
            values = level * scale[..., None] + zero[..., None]
            best = (values - number[..., None]).abs().amin(-1)
            torch.testing.assert_close((found - number).abs(), best, atol=1e-5 * scale.max().item() + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_code_gives_its_level(dtype):
    coding = Coding(bits=((2, 3), (8, 1), (0, 2), (3, 5), (1, 1), (5, 2), (4, 3), (6, 1)))
    codec, levels = table_codec(coding)
    for code in range(256):
        x = torch.stack([torch.zeros(()) if level is None else level[code % len(level)] for level in levels])
        assert torch.equal(codec.decode(codec.encode(x), dtype), x.to(dtype))


def test_rows_may_lie_anywhere_and_in_any_number():
    codec, _ = table_codec(Coding(bits=((4, 3), (16, 2), (3, 2)), outliers=1))
    x = random(2, 700, 7)
    held = torch.zeros(2, 800, codec.row_bytes + 1, dtype=torch.uint8)[:, 3:703, 1:]  # odd strides, an odd start
    held.copy_(codec.encode(x))
    one_by_one = torch.cat([codec.decode(held[:, t : t + 1], torch.float32) for t in range(0, 700, 50)], 1)
    assert torch.equal(codec(x)[:, ::50], one_by_one)


@pytest.mark.parametrize("token_scale", [False, True])
def test_outliers_are_exact(token_scale):
    coding = Coding(bits=((3, 20), (0, 10), (4, 10)), outliers=4, token_scale=token_scale)
    codec, _ = table_codec(coding)
    x = random(5, 40)
    places = torch.tensor([3, 17, 25, 38])
    x[:, places] = torch.tensor([900.0, -700.0, 800.0, -1000.0])
    found = codec(x)
    assert torch.equal(found[:, places], x[:, places])
    assert found.abs().sort(-1).values[:, :-4].max() < 10, "outliers widen no scale"


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_within_its_step(name):
    coding = GRIDS[name]
    codec = make_codec(coding)
    x = random(4, 13) * torch.tensor([0.1, 1, 30, 0])[:, None]
    assert codec.encode(x).shape == (4, coding.row_bytes) and coding.table_numbers == 0
    block = coding.block or 13
    largest = torch.cat([part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.split(block, -1)], -1)
    step = {"int8": largest / 127, "int4": largest / 7, "fp8": x.abs() / 8 + largest / 448 / 2**9}[name]
    assert ((codec(x) - x).abs() <= 0.51 * step + 2e-3 * largest + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_keeps_the_numbers(dtype):
    codec, x = make_codec(Coding(bits=((16, 5),), kind="plain")), random(3, 5).to(dtype)
    assert torch.equal(codec(x), x) and codec.encode(x).dtype == dtype


def test_gradients_pass_straight_through():
    codec, _ = table_codec(Coding(bits=((2, 6),)))
    x = random(3, 6).requires_grad_()
    (codec(x) * torch.arange(6.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(6.0).expand(3, 6))


def test_tables_travel_in_the_state_and_damaged_ones_are_named():
    coding = Coding(bits=((3, 4), (6, 2)))
    codec, _ = table_codec(coding)
    other = make_codec(coding)
    other.load_state_dict(codec.state_dict())
    x = random(9, 6)
    assert torch.equal(other(x), codec(x))
    for damage in (float("nan"), 1e9):
        state = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
        state["levels"][5] = damage
        other.load_state_dict(state)
        with pytest.raises(ValueError, match="not finite or not sorted"):
            other(x)
    with pytest.raises(ValueError, match="must have shapes"):
        codec.set_tables({3: torch.zeros(4, 8)})


@pytest.mark.parametrize(
    "bad",
    [{"bits": ((7, 1),)}, {"kind": "nuq"}, {"outliers": 3}, {"kind": "int"}, {"kind": "fp8", "token_scale": True}],
)
def test_bad_codings_are_refused(bad):
    with pytest.raises(ValueError, match="coding: "):
        Coding(**{"bits": ((3, 2),), **bad})

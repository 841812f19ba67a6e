"""Attention over codes in C reads what torch reads, for every kind of code; without a compiler torch does it all."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import anymla
from anymla.modeling import c_decode, c_rows, coded_attention, coded_latent, rows_attention
from anymla.modeling.absorbed import additive_mask
from anymla.modeling.c_decode import Keys, Softmax, Turning, Values, attend_in_c
from anymla.modeling.c_library import LANES, SWITCH, TILE, library
from anymla.modeling.c_rows import encoded, not_zero, not_zero_turned
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import WIDTHS, Coding
from anymla.modeling.heads import attention_weights
from anymla.modeling.placed_tokens import Places, Run
from tests.coded_models import coded_model
from tests.families import save_model, token_ids
from tests.family_models import tiny_model

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler")
KINDS = {
    "3 bits": Coding(bits=((3, 12),)),
    "outliers": Coding(bits=((2, 12),), outliers=2),
    "scale": Coding(bits=((4, 12),), token_scale=True, outliers=3),
    "float16": Coding(bits=((16, 3), (0, 4), (5, 5))),
    "nothing": Coding(bits=((0, 12),)),
    "int8": Coding(bits=((8, 12),), kind="int", block=4),
    "int4": Coding(bits=((4, 12),), kind="int"),
    "fp8": Coding(bits=((8, 12),), kind="fp8", block=6),
}
LENGTH = 2 * TILE + 5


def codec_of(coding):
    """A codec with random levels."""
    codec, generator = make_codec(coding), torch.Generator().manual_seed(1)
    if coding.kind == "table":
        counts = {bits: count for bits, count in coding.counts.items() if 0 < bits < 16}
        codec.set_tables(
            {bits: torch.randn(count, 2**bits, generator=generator).sort().values for bits, count in counts.items()}
        )
    return codec


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_tokens(width):
    """Tokens of the first sequence at both ends of a tile, and a window of all sequences."""
    column = torch.tensor([0, TILE - 1, TILE, LENGTH - 1])
    numbers = random(2, 4, width, seed=3)
    places = Places(*numbers, torch.zeros(4, dtype=torch.long), column, column.tolist())
    return places, Run(*random(2, 2, 5, width, seed=4), LENGTH - 7)


def read(codec, rows, exact, values):
    """What torch reads, with the exact tokens in place."""
    states = codec.decode(rows, torch.float32)
    for each in exact:
        each.put(states, 0, values=values)
    return states


def by_columns(rows):
    """The same rows, whose tokens lie side by side."""
    return rows.mT.contiguous().mT


STILL = Turning(torch.empty(3, 0, dtype=torch.int32), torch.empty(2, 0, TILE), torch.empty(3, 2, 0), None)


def attended(query, keys, values, new=1, *, mask=None, constant=None, softcap=None, sinks=None):
    """Attention as torch has it: queries [B,g,R,w], keys and values [B,S,g w]; and what sinks leave."""
    groups, heads = query.shape[1], query.shape[1] * query.shape[2]
    scores = torch.einsum("bghw,bsgw->bghs", query, keys.unflatten(-1, (groups, -1))).flatten(1, 2)
    scores = scores.unflatten(1, (-1, new))
    weights = attention_weights(scores if constant is None else scores + constant, mask, softcap, sinks).flatten(1, 2)
    groups = values.shape[-1] // query.shape[-1]
    weights = weights.unflatten(1, (groups, -1))
    context = torch.einsum("bghs,bsgw->bghw", weights, values.unflatten(-1, (groups, -1))).flatten(1, 2)
    assert context.shape[1] == heads
    return context, weights.sum(-1).flatten(1)


def close(found, expected, size=1.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * size)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("layout", [by_columns, torch.Tensor.contiguous])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_read_as_torch_reads_it(kind, layout):
    codec, heads = codec_of(KINDS[kind]), 7
    rows, exact = layout(codec.encode(2 * random(2, LENGTH, codec.width))), exact_tokens(codec.width)
    query = random(2, 2, heads, codec.width // 2)
    keys, values = (read(codec, rows, exact, side) for side in (False, True))
    given = ([Keys(codec, rows, query, STILL)], Values(2, codec, rows), exact, torch.float32, Softmax())
    found = attend_in_c(*given)
    close(found, attended(query, keys, values))
    assert all(torch.equal(*each) for each in zip(attend_in_c(*given), found, strict=True))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("kind", ["3 bits", "scale", "fp8"])
def test_rows_may_be_keys_and_values_and_scores_sums(kind):
    codec, other = codec_of(KINDS[kind]), codec_of(KINDS["outliers"])
    rows, exact = codec.encode(random(2, LENGTH, 12)), exact_tokens(12)
    more = other.encode(random(2, LENGTH, 12, seed=5))
    query, asked = random(2, 1, 6, 12), random(2, 1, 6, 12, seed=6)
    keys = [Keys(codec, rows, query, STILL), Keys(other, more, asked, STILL, second=True)]
    latent, rope = read(codec, rows, exact, False), read(other, more, exact, True)
    joined = attended(torch.cat([query, asked], -1), torch.cat([latent, rope], -1), torch.cat([latent, latent], -1))
    found = attend_in_c(keys, Values(1), exact, torch.float32, Softmax())
    close(found, (joined[0][..., :12], joined[1]))


MASKS = {
    "none": None,
    "of all": (1, 1),
    "of heads": (1, 6),
    "of sequences": (2, 1),
}


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_scores_become_weights_as_in_torch(mask, softcap, sinks, size):
    codec, new = codec_of(KINDS["3 bits"]), 2
    rows, shape = codec.encode(random(2, LENGTH, 12)), MASKS[mask]
    query, constant = size * random(2, 2, 3 * new, 6), random(2, 6, new, 1, seed=2)
    shown = shape and additive_mask(random(*shape, new, LENGTH, seed=3) > 0, torch.float32)
    if shape and shape[0] == 2:
        shown[0, :, 0], shown[1, :, 1, : TILE + 1] = shown.min(), shown.min()  # all of a row, the first tile of another
    options = {"mask": shown, "softcap": softcap, "sinks": random(6, seed=4) if sinks else None}
    options["constant"] = constant if shape else None
    numbers = codec.decode(rows, torch.float32)
    found = attend_in_c(
        [Keys(codec, rows, query, STILL)], Values(2, codec, rows), (), torch.float32, Softmax(new, **options)
    )
    close(found, attended(query, numbers, numbers, new, **options))


@needs_compiler
@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(2, 9)), min_size=1, max_size=6),
    st.integers(1, 140),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1e-7, 1e-4, 2.0, 1e5]),
)
def test_any_widths_are_written_and_read(bits, tokens, outliers, token_scale, size):
    scaled = token_scale and not any(each in (0, 16) for each, _ in bits)
    others = sum(count for each, count in bits if each != 16)  # those have no errors, and so all tie
    outliers = min(outliers, others, sum(count for _, count in bits) - 1)
    codec = codec_of(Coding(bits=tuple(bits), outliers=outliers, token_scale=scaled))
    x = size * random(1, tokens, codec.width)
    rows = encoded(codec, x)
    assert torch.equal(rows, codec.encode(x))
    query, numbers = random(1, 1, 2, codec.width) / max(1.0, size), codec.decode(rows, torch.float32)
    found = attend_in_c([Keys(codec, rows, query, STILL)], Values(1), (), torch.float32, Softmax())
    close(found, attended(query, numbers, numbers), max(1.0, size))  # large numbers cancel


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("kind", ["3 bits", "outliers", "scale", "float16"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_codes_do_not_depend_on_the_default_dtype(kind, default):
    codec, x = codec_of(KINDS[kind]), random(1, 9, 12)
    expected = codec.encode(x)
    torch.set_default_dtype(default)
    try:
        again = codec_of(KINDS[kind])
        again.set_tables({bits: table.float() for bits, table in codec._tables().items()})
        assert torch.equal(encoded(again, x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("kind", ["outliers", "scale"])
@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_without_an_end_are_coded_as_in_torch(kind, place, value):
    codec, x = codec_of(KINDS[kind]), random(1, 5, 12)
    x[0, 2, place] = float(value)
    found, expected = (codec.decode(rows, torch.float32) for rows in (encoded(codec, x), codec.encode(x)))
    torch.testing.assert_close(found, expected, equal_nan=True)


@needs_compiler
@torch.no_grad()
def test_an_infinite_float16_is_no_outlier():
    codec, x = codec_of(Coding(bits=((16, 1), (4, 7)), outliers=1)), random(1, 5, 8)
    x[..., 0] = float("inf")
    assert torch.equal(encoded(codec, x), codec.encode(x))


BASES = [("own", "own"), ("channels", "axes"), ("axes", "axes")]
FAMILIES = {
    "llama": {},
    "gemma2": {},
    "phi": {},
    "gpt_oss": {},
    "olmo2": {},
    "qwen3": {"key_block": 1, "value_block": 1},
}


def answers(model):
    """Logits of some tokens after a prompt, with padding on the left of one sequence."""
    ids, mask = token_ids(2, 2 * TILE + 9), torch.ones(2, 2 * TILE + 9, dtype=torch.long)
    mask[1, :20] = 0
    cache, found = DynamicCache(config=model.config), []
    for part in (slice(0, 2 * TILE + 4), slice(2 * TILE + 4, 2 * TILE + 5), slice(2 * TILE + 5, 2 * TILE + 9)):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, part]
        inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions, "past_key_values": cache}
        found.append(model(input_ids=ids[:, part], **inputs).logits)
    return torch.cat(found[1:], 1)


def check_against_torch(model, monkeypatch):
    called = []
    for module in (coded_attention, coded_latent):
        monkeypatch.setattr(module, "attend_in_c", lambda *given: called.append(1) or attend_in_c(*given))
    by_c = answers(model)
    assert called
    called.clear()
    for module in (coded_attention, coded_latent):
        monkeypatch.setattr(module, "runs_in_c", lambda *_: False)
    monkeypatch.setattr(rows_attention, "encoded", lambda codec, x: codec.encode(x))
    torch.testing.assert_close(by_c, answers(model), rtol=1e-3, atol=1e-3)
    assert not called


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize(("family", "bases"), [*product(FAMILIES, BASES)], ids=str)
@pytest.mark.parametrize("window", [0, 4])
def test_models_say_the_same(family, bases, window, monkeypatch):
    changes = FAMILIES[family] if bases[0] != "own" else {}
    model = coded_model(tiny_model(family, torch.float32), *bases, 3, exact_window=window, **changes)
    check_against_torch(model, monkeypatch)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize(
    ("before", "family"), [*product(["mla", "mfa", "lorc"], ["llama", "gemma2"]), ("mla", "bloom")], ids=str
)
def test_latents_say_the_same(before, family, tmp_path, monkeypatch):
    source = save_model(tiny_model(family, torch.float32), tmp_path / "source")
    text = {"calibration_tokens": 512, "calibration_length": 32}
    settings = {"mla": text | {"reconstruction_steps": 0}, "mfa": text, "lorc": {}}[before] | {"kv_cache": 0.5}
    anymla.run(source, tmp_path / "out", steps=[{before: settings}, {"kvquant": text | {"bits": 3}}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    check_against_torch(model, monkeypatch)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("latent", [False, True])
def test_masks_of_other_shapes_are_broadcast_or_refused(latent, tmp_path):
    model, ids = tiny_model("llama", torch.float32), token_ids(1, 20)
    if latent:
        source, text = save_model(model, tmp_path / "source"), {"calibration_tokens": 512, "calibration_length": 32}
        mla = text | {"kv_cache": 0.5, "reconstruction_steps": 0}
        anymla.run(source, tmp_path / "out", steps=[{"mla": mla}, {"kvquant": text | {"bits": 3}}])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    else:
        model = coded_model(model, "channels", "axes", 3)

    def answer(shape):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :18], past_key_values=cache)
        return model(input_ids=ids[:, 18:], attention_mask=torch.zeros(shape), past_key_values=cache).logits

    expected = answer((1, 1, 2, 20))
    for shape in ((1, 1, 1, 1), (1, model.config.num_attention_heads, 1, 20), (1, 1, 2, 1)):
        torch.testing.assert_close(answer(shape), expected)
    for shape in ((1, 1, 2, 10), (1, 1, 3, 20)):
        with pytest.raises(RuntimeError, match="size"):
            answer(shape)


@needs_compiler
@torch.no_grad()
def test_a_tile_without_a_visible_token_counts_nothing():
    codec, mask = codec_of(KINDS["3 bits"]), torch.zeros(1, 1, 1, LENGTH)
    rows, query = codec.encode(random(1, LENGTH, 12)), random(1, 2, 3, 6)
    mask[..., : TILE + 1] = -torch.inf
    numbers = codec.decode(rows, torch.float32)
    found = attend_in_c(
        [Keys(codec, rows, query, STILL)], Values(2, codec, rows), (), torch.float32, Softmax(mask=mask)
    )
    close(found, attended(query, numbers, numbers, mask=mask))


@needs_compiler
@torch.no_grad()
def test_a_static_cache_and_gradients(monkeypatch):
    model, ids = coded_model(tiny_model("llama", torch.float32), "channels", "axes", 3), token_ids(1, 30)
    cache = StaticCache(config=model.config, max_cache_len=40)
    steps = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([24, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    for module in (c_decode, c_rows):
        monkeypatch.setattr(module, "loaded", lambda: pytest.fail("C has no gradients"))
    with torch.enable_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :20], past_key_values=cache)
        model(input_ids=ids[:, 20:22], past_key_values=cache).logits.sum().backward()


@needs_compiler
@torch.no_grad()
def test_exact_tokens_of_another_width_are_refused():
    codec = codec_of(KINDS["3 bits"])
    keys = [Keys(codec, codec.encode(random(1, 9, 12)), random(1, 1, 1, 12), STILL)]
    with pytest.raises(ValueError, match="8 coefficients, the rows have 12"):
        attend_in_c(keys, Values(1), [Run(*random(2, 1, 2, 8), 0)], torch.float32, Softmax())


def test_a_pair_with_one_coded_part_is_read_whole():
    coding = Coding(bits=((2, 1), (0, 2), (3, 1)))
    assert not_zero(coding).tolist() == [0, 3]
    assert not_zero_turned(coding, torch.tensor([[0], [2], [0]])).tolist() == [0, 2, 3]


def test_a_tile_is_whole_vectors():
    assert TILE % (2 * LANES) == 0  # of numbers
    assert TILE % (4 * LANES) == 0  # of bytes


@pytest.mark.parametrize("compiler", ["missing", "failing", "off"])
def test_without_a_compiler_torch_does_it(compiler, tmp_path, monkeypatch):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", {"missing": str(tmp_path / "none"), "failing": str(failing), "off": "cc"}[compiler])
    monkeypatch.setenv(SWITCH, "0" if compiler == "off" else "1")
    library.cache_clear()
    try:
        assert library() is None
        model, ids = coded_model(tiny_model("llama", torch.float32), "channels", "axes", 3), token_ids(1, 30)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([24, 6], dim=1)]
            expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-3, atol=1e-3)
    finally:
        library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))

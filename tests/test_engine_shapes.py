"""Sizes and number formats that engines take: one table, which plan, convert and export read."""

import json

import pytest

import anymla
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.engine_shapes import CACHE_TYPES, GPU, LLAMA_CPP
from anymla.errors import InfeasibleError, RecipeError
from anymla.exports.format import all_formats
from anymla.exports.padding import PADS
from anymla.layouts import LAYOUTS, SHAPES
from anymla.methods.mla.settings import MLA
from anymla.methods.mla.split import agreed, open_splits
from tests.damage import BUNDLED
from tests.families import FAST, make_model, save_model

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 1}  # 256 numbers


@pytest.fixture
def wide(tmp_path):
    return save_model(make_model("llama", **WIDE), tmp_path / "wide")


def test_formats_and_pads_are_those_of_the_table():
    for name, layout in LAYOUTS.items():
        assert SHAPES[name] is layout.shapes and all_formats()[name].caches == tuple(layout.shapes.cache_types)
    assert ("none", *GPU.pads) == PADS and set(CACHE_TYPES) == {"fp8", "q8_0", "q4_0"}
    assert all(GPU.refusal(*sizes, "fp8") is None and sizes[0] <= GPU.rank for sizes in GPU.compiled)


@pytest.mark.parametrize(
    ("shapes", "asked", "nearest"),
    [
        (LLAMA_CPP, (100, 24, "q8_0"), (96, 32)),
        (LLAMA_CPP, (113, 0, "q4_0"), (128, 0)),
        (LLAMA_CPP, (3, 2, "q4_0"), (32, 32)),
        (LLAMA_CPP, (100, 24, None), (100, 24)),
        (GPU, (100, 80, None), (100, 64)),
        (GPU, (100, 64, "fp8"), (100, 64)),
    ],
)
def test_a_refusal_names_the_nearest_sizes(shapes, asked, nearest):
    assert shapes.nearest(*asked) == nearest
    reason = shapes.refusal(*asked)
    assert reason is None if nearest == asked[:2] else f"--kv-rank {nearest[0]}" in reason
    assert shapes.refusal(*nearest, asked[2]) is None


@pytest.mark.parametrize("kv_cache", [0.25, 0.4, 0.5, 0.9])
def test_a_quantised_cache_of_llama_cpp_has_whole_blocks(kv_cache, wide):
    plan = anymla.plan(wide, kv_cache=kv_cache, target="gguf", cache_type="q4_0")
    (layer,) = plan.layers
    splits = [(dims, layer.cached_numbers - dims) for dims in layer.rope_choices or (layer.rope_dims,)]
    assert splits and all(dims % 32 == rank % 32 == 0 for dims, rank in splits)
    assert kv_cache * 256 - 32 < layer.cached_numbers <= kv_cache * 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_rank": 100, "rope_dims": 24}, "nearest to rank 100 and rope dims 24 is --kv-rank 96 --rope-dims 32"),
        ({"kv_cache": 0.5, "kv_rank": 50}, "is --kv-rank 64 --rope-dims 64"),
        ({"kv_cache": 0.2}, "the smallest possible is --kv-cache 0.25"),
    ],
)
def test_sizes_that_are_no_blocks_are_refused(settings, message, wide):
    with pytest.raises(InfeasibleError, match=message):
        anymla.plan(wide, target="gguf", cache_type="q8_0", **settings)


def test_a_cache_type_needs_its_target(wide):
    for target, message in ((None, "needs --target gguf$"), ("vllm", "needs --target gguf; --target vllm has fp8")):
        with pytest.raises(RecipeError, match=message):
            anymla.plan(wide, target=target, cache_type="q8_0")
    with pytest.raises(RecipeError, match="needs --target deepseek or vllm; --target gguf has q8_0 and q4_0"):
        anymla.plan(wide, target="gguf", cache_type="fp8")
    with pytest.raises(InfeasibleError, match="q8_0 takes 32 rope dims at least, --target gguf holds 8"):
        anymla.plan(BUNDLED, kv_cache=0.9, target="gguf", cache_type="q8_0")


def test_a_plan_file_of_other_sizes_is_refused(wide, tmp_path):
    plan = anymla.plan(wide, kv_cache=0.5, target="gguf", cache_type="q8_0")
    (layer,) = plan.layers
    changed = layer.model_copy(update={"rope_dims": 24, "kv_rank": layer.cached_numbers - 24, "rope_choices": ()})
    with pytest.raises(InfeasibleError, match="nearest to rank 104 and rope dims 24 is --kv-rank 96 --rope-dims 32"):
        anymla.convert(wide, tmp_path / "out", plan.model_copy(update={"layers": (changed,)}))


def test_the_plan_says_what_kernels_are_compiled_for(tmp_path):
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    source = save_model(model, tmp_path)
    none = {"reconstruction_steps": 0}
    notes = {
        name: anymla.explain_plan(anymla.plan(source, target=name, kv_cache=0.5, **none))["notes"]
        for name in ("vllm", "gguf")
    }
    assert notes["gguf"] == []
    assert "compiled for r 256 + R 64, which is --kv-cache 0.625 --kv-rank 256 --rope-dims 64" in notes["vllm"][0]
    fits = anymla.plan(source, target="vllm", kv_cache=0.625, kv_rank=256, rope_dims=64, **none)
    assert anymla.explain_plan(fits)["notes"] == []


def test_a_rank_that_kernels_use_whole_is_taken_where_it_loses_hardly_more(wide):
    method = MLA(kv_cache=0.375, target="vllm")
    model = read_model_spec(read_config(wide))
    plan = method.plan(model)
    splits = open_splits(plan.choices[0], method, model)
    ranks = [96 - split.rope_dims for split in splits]
    assert {rank for rank in ranks if GPU.preferred(rank)} == {64, 32}

    def chosen(more):
        facts = [{"lost": [1.0 + more * (rank == 64) + (rank == 32) for rank in ranks]}]
        (layer,) = agreed(plan.choices, method, model, facts)
        return layer.kv_rank

    assert chosen(0.01) == 64 and chosen(0.03) == max(ranks)


def test_a_conversion_for_a_quantised_cache_fills_nothing_up(wide, tmp_path):
    done = anymla.convert(wide, tmp_path / "out", kv_cache=0.5, target="gguf", cache_type="q8_0", **FAST)
    assert {(layer.rope_dims % 32, layer.kv_rank % 32) for layer in done.layers} == {(0, 0)}
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told["recipe"]["cache_type"] == "q8_0"
    assert "--to gguf --cache-type q8_0 -o SERVED" in (tmp_path / "out" / "report.html").read_text()

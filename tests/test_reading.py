"""What conversion reads of an attention module and its config: order of dims, fused rows, known parts, rope."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.nanochat import modeling_nanochat

from anymla.architectures.attention import pair_order
from anymla.architectures.families import FAMILIES
from anymla.architectures.layers import has_rope
from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.parts import _split_fused, check_parts
from anymla.errors import UnsupportedModelError
from anymla.methods.mla.moments import rotate
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.heads import rope_tables, window_of
from tests.family_models import tiny_config

fast = settings(max_examples=25, deadline=None)
sizes = {
    "kv_heads": st.integers(1, 4),
    "group": st.integers(1, 3),
    "pairs": st.integers(1, 5),
    "rest": st.integers(0, 3),
    "seed": st.integers(0, 1000),
}


def spec_of(heads, kv_heads, d, pairs):
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d,
        rope_pairs=pairs,
        qkv_bias=False,
        output_bias=False,
        qk_norm=False,
        sliding_window=None,
        cache_window=None,
        cached_heads=kv_heads,
    )


def stock_rope(kind, heads, angle, pairs):
    """Heads [B,H,T,d] as the family itself turns them, and what it hands to its attention; angle [B,T,P]."""
    turned, rest = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
    halves = tuple(torch.cat([table, table], -1) for table in (angle.cos(), angle.sin()))
    repeated = tuple(table.repeat_interleave(2, -1) for table in (angle.cos(), angle.sin()))
    if kind == "llama4":
        tables = torch.polar(torch.ones_like(angle), angle)
        by_token = turned.transpose(1, 2).contiguous()
        turned = modeling_llama4.apply_rotary_emb(by_token, by_token, tables)[0].transpose(1, 2)
    elif kind == "gptj":
        tables = None  # made of positions by LatentAttention
        sin, cos = angle.sin(), angle.cos()
        turned = modeling_gptj.apply_rotary_pos_emb(turned.transpose(1, 2), sin, cos).transpose(1, 2)
    else:
        module = {
            "llama": modeling_llama,
            "cohere": modeling_cohere,
            "glm": modeling_glm,
            "nanochat": modeling_nanochat,
        }[kind]
        tables = repeated if kind == "cohere" else halves
        turned = module.apply_rotary_pos_emb(turned, turned, *tables)[0]
    return torch.cat([turned, rest], -1), tables


@pytest.mark.parametrize("kind", ["llama", "cohere", "glm", "nanochat", "llama4", "gptj"])
@fast
@given(**sizes)
def test_rope_in_our_order_is_the_family_s_rope(kind, kv_heads, group, pairs, rest, seed):
    """Order of dims and tables together: rotate(q in our order) = (the family's rope of q) in our order."""
    random = torch.Generator().manual_seed(seed)
    heads, d, batch, length = kv_heads * group, 2 * pairs + rest, 2, 7
    query = torch.randn(batch, heads, length, d, generator=random, dtype=torch.float64)
    positions = torch.randint(0, 50, (batch, length), generator=random)
    frequencies = 1.0 / (10000 ** (torch.arange(0, 2 * pairs, 2) / (2 * pairs)))
    angle = positions[..., None].float() * frequencies
    family = FAMILIES["llama4_text" if kind == "llama4" else kind]
    like, angle = torch.zeros(batch, length, 4, dtype=torch.float64), angle if kind == "gptj" else angle.double()
    expected, tables = stock_rope(kind, query, angle, pairs)
    cos, sin = rope_tables(family.rope_table, pairs, tables, positions, like)
    assert cos.shape == sin.shape == (batch, 1, length, pairs)
    assert cos.dtype == sin.dtype == torch.float64
    order = pair_order(spec_of(heads, kv_heads, d, pairs), family)
    assert torch.equal(order.sort().values, torch.arange(d))
    found = rotate(query[..., order], torch.complex(cos, sin))
    tolerance = 1e-5 if kind in ("cohere", "llama4", "gptj") else 1e-12  # those families compute rope in float32
    assert torch.allclose(found, expected[..., order], atol=tolerance)


def test_tables_that_no_family_hands_over():
    like = torch.zeros(2, 5, 8)
    cos, sin = rope_tables("none", 0, None, None, like)
    assert cos.shape == sin.shape == (1, 1, 5, 0)
    with pytest.raises(ValueError, match="position_ids"):
        rope_tables("sinusoids", 2, None, None, like)


def packed(query, key, value, layout):
    """Rows [H d, D] and [G d, D] as the families fuse them."""
    if layout == "concat":
        return torch.cat([query, key, value])
    if layout == "codegen":
        blocks = zip(*(part.chunk(4) for part in (query, value, key)), strict=True)
        return torch.cat([part for block in blocks for part in block])
    groups = len(key) // GROUPED_DIM
    parts = zip(*(part.chunk(groups) for part in (query, key, value)), strict=True)
    return torch.cat([part for group in parts for part in group])


GROUPED_DIM = 3


@fast
@given(sizes["kv_heads"], sizes["group"], st.sampled_from(["concat", "grouped", "codegen"]))
def test_fused_rows_are_given_back(kv_heads, group, layout):
    if layout == "codegen":
        kv_heads, group = 4 * kv_heads, 1  # four blocks of whole heads, no grouped queries
    d, heads = GROUPED_DIM, kv_heads * group
    rows = torch.arange((heads + 2 * kv_heads) * d * 2, dtype=torch.float64).view(-1, 2)
    parts = rows.split([heads * d, kv_heads * d, kv_heads * d])
    split = _split_fused(packed(*parts, layout), spec_of(heads, kv_heads, d, 0), layout)
    assert all(torch.equal(found, expected) for found, expected in zip(split, parts, strict=True))


def test_unknown_part_is_refused_by_name():
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    check_parts(attention)
    attention["lambda_proj"] = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="ModuleDict has a part 'lambda_proj'"):
        check_parts(attention)
    bare = nn.Linear(4, 4)
    bare.head_scale = nn.Parameter(torch.ones(4))  # a parameter of its own counts as much as a module's
    with pytest.raises(UnsupportedModelError, match=r"'(weight|head_scale)'"):
        check_parts(bare)


SLIDING = ["sliding_attention", "full_attention"]
ROPE_CASES = [
    ("llama", {}, [True, True]),
    ("cohere2", {"layer_types": SLIDING}, [True, False]),
    # Command R7B: the field names the order of dims, and the layers go by a pattern
    ("cohere2", {"position_embedding_type": "rope_gptj", "sliding_window_pattern": 2}, [True, False]),
    ("exaone4", {"layer_types": SLIDING, "sliding_window": 8}, [True, False]),
    ("exaone4", {"layer_types": ["full_attention"] * 2, "sliding_window": None}, [True, True]),  # EXAONE 4.0 1.2B
    ("cohere2_moe", {"layer_types": SLIDING[::-1], "mlp_layer_types": ["dense", "sparse"]}, [True, True]),
    ("cohere2_moe", {"layer_types": SLIDING[::-1], "first_k_dense_replace": 1}, [True, True]),
    ("cohere2_moe", {"layer_types": SLIDING[::-1], "mlp_layer_types": ["sparse", "sparse"]}, [False, True]),
    (
        "cohere2_moe",
        {
            "layer_types": SLIDING[::-1],
            "mlp_layer_types": ["dense", "sparse"],
            "prefix_dense_sliding_window_pattern": 2,
        },
        [False, True],
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, [True, False]),
    ("granitemoehybrid", {"position_embedding_type": None}, [False, False]),
    ("granitemoehybrid", {"position_embedding_type": "nope"}, [False, False]),
    ("granitemoehybrid", {"position_embedding_type": "rope"}, [True, True]),
    ("falcon", {"alibi": True}, [False, False]),
    ("gpt2", {}, [False, False]),
]


@pytest.mark.parametrize(("family", "config", "expected"), ROPE_CASES)
def test_layers_with_rope(family, config, expected):
    assert [has_rope(config, FAMILIES[family], index) for index in range(2)] == expected


def test_rope_that_depends_on_types_the_config_does_not_give():
    with pytest.raises(UnsupportedModelError, match="layer_types is missing"):
        has_rope({}, FAMILIES["cohere2"], 0)


def test_window_of_a_layer():
    mistral, by_type = (
        SimpleNamespace(sliding_window=8),
        SimpleNamespace(sliding_window=8, layer_types=SLIDING),
    )
    bare, own = SimpleNamespace(), SimpleNamespace(sliding_window=5)
    assert window_of(bare, mistral, 1) == 8  # the module asks the config
    assert window_of(own, mistral, 1) == 5
    assert window_of(SimpleNamespace(sliding_window=None), mistral, 1) is None
    assert window_of(own, by_type, 0) == 5
    assert window_of(own, by_type, 1) is None  # EXAONE's modules keep the window even where they do not use it
    assert window_of(bare, by_type, 1) is None
    assert window_of(bare, SimpleNamespace(), 0) is None


@pytest.mark.parametrize("family", ["cohere2", "exaone4", "gemma2", "gpt_neo", "qwen2", "mistral"])
def test_windows_of_spec_and_config_agree(family):
    config = tiny_config(family)
    windows = [layer.attention.sliding_window for layer in read_model_spec(config.to_dict()).layers]
    types = getattr(config, "layer_types", getattr(config, "attention_layers", None)) or ["sliding_attention"] * 2
    assert windows == [12 if kind in ("sliding_attention", "local") else None for kind in types]

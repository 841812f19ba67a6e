"""Bad configs of families other than Llama, in fields that Llama has not; all known before any weight is read."""

from typing import Any

from tests.damage import REMOVED, Case, shaped

NO_SIZES = {"zero": 0, "negative": -6, "huge": 10**18, "text": "6", "list": [6]}
NO_LISTS = {
    "text": "full_attention",
    "short": ["full_attention"],
    "unknown": ["full_attention", "spiral"],
    "null": [None, None],
}
NO_SHARES = {"zero": 0, "negative": -0.5, "more": 1.5, "text": "half", "nan": float("nan"), "tiny": 0.01, "bool": True}


def of(family: str, field: str, kinds: dict[str, Any], *words: str, **changes: Any) -> list[Case]:
    """A case for each of these values of a field; the message must name the field, or hold the words."""
    return [
        Case(
            f"{family}-{field}-{kind}", "", words or ("config.json", field), shaped(family, **changes, **{field: value})
        )
        for kind, value in kinds.items()
    ]


LISTED: dict[str, Any] = {"layer_types": REMOVED}
FAMILY_CONFIGS = [
    *of("gpt2", "n_embd", NO_SIZES),
    *of("gpt2", "n_head", NO_SIZES),
    *of("gpt2", "n_head", {"odd": 5}, "hidden_size 48", "num_attention_heads 5"),
    *of("gpt2", "n_layer", {"billion": 10**9}),
    *of("gpt2", "n_positions", NO_SIZES),
    *of("gpt2", "n_inner", {"negative": -1}),
    *of("bloom", "n_head", {"odd": 7, "zero": 0}, "config.json"),
    *of("bloom", "n_layer", {"text": "2"}),
    *of("opt", "ffn_dim", {"zero": 0, "text": "64"}),
    *of("opt", "enable_bias", {"text": "yes"}),
    *of("mpt", "n_heads", {"zero": 0, "list": [6]}),
    *of(
        "falcon",
        "num_kv_heads",
        {"odd": 4},
        "num_attention_heads 6",
        "num_key_value_heads 4",
        new_decoder_architecture=True,
    ),
    *of("falcon", "multi_query", {"text": "yes", "number": 1}),
    *of("falcon", "alibi", {"text": "no"}),
    *of("falcon", "bias", {"list": []}),
    *of("gpt_neox", "rotary_pct", NO_SHARES, rope_parameters=REMOVED),
    *of("phi", "partial_rotary_factor", NO_SHARES, rope_parameters=REMOVED),
    *of(
        "glm",
        "rope_parameters",
        {"share": {"rope_type": "default", "partial_rotary_factor": 2}},
        "partial_rotary_factor",
        "2",
    ),
    *of("gptj", "rotary_dim", {"zero": 0, "larger": 10, "odd": 3, "negative": -4, "text": "4", "huge": 10**18}),
    *of("codegen", "rotary_dim", {"larger": 64}),
    *of("gemma2", "layer_types", NO_LISTS),
    *of("gemma2", "layer_types", {"object": {"0": "full_attention"}}),
    *of("gemma2", "sliding_window", {"negative": -4, "text": "4096"}),
    *of("gemma2", "head_dim", {"odd": 7, "zero": 0}),
    *of("jamba", "attn_layer_period", {"zero": 0, "negative": -2, "text": "2", "fraction": 1.5, "list": [2]}),
    *of("jamba", "attn_layer_offset", {"negative": -1, "text": "1"}),
    *of("jamba", "attn_layer_offset", {"past": 2}, "no layer", "softmax attention"),
    *of("bamba", "attn_layer_indices", {"text": "1", "texts": ["1"], "negative": [-1], "number": 1}),
    *of("bamba", "attn_layer_indices", {"none": []}, "no layer", "softmax attention"),
    *of("lfm2", "full_attn_idxs", {"text": "01", "nested": [[1]]}, **LISTED),
    *of(
        "nemotron_h",
        "hybrid_override_pattern",
        {"list": ["M", "*"], "short": "*", "number": 7},
        layers_block_type=REMOVED,
        num_hidden_layers=2,
    ),
    *of(
        "nemotron_h",
        "hybrid_override_pattern",
        {"none": "MM"},
        "no layer",
        "softmax attention",
        layers_block_type=REMOVED,
    ),
    *of("nemotron_h", "layers_block_type", {"unknown": ["spiral", "mamba"], "text": "mamba"}),
    *of("qwen3_next", "full_attention_interval", {"zero": 0, "negative": -1, "text": "4"}, **LISTED),
    *of("qwen3_next", "layer_types", {"linear": ["linear_attention"] * 2}, "no layer", "softmax attention"),
    *of("qwen2", "max_window_layers", {"negative": -1, "text": "1"}),
    *of("qwen2", "use_sliding_window", {"text": "no"}),
    *of("smollm3", "no_rope_layers", {"short": [1], "text": "10", "texts": ["1", "0"], "object": {"0": 1}}),
    *of("smollm3", "no_rope_layer_interval", {"negative": -4, "text": "4"}, no_rope_layers=REMOVED),
    *of("llama4_text", "no_rope_layers", {"short": [1]}),
    *of(
        "laguna",
        "num_attention_heads_per_layer",
        {"short": [6], "texts": [6, "6"], "zero": [6, 0], "huge": [6, 10**18], "text": "66"},
    ),
    *of("laguna", "num_attention_heads_per_layer", {"odd": [6, 7]}, "num_attention_heads 7", "num_key_value_heads 3"),
    *of("granitemoehybrid", "position_embedding_type", {"number": 7}),
    *of("granitemoehybrid", "num_local_experts", {"huge": 10**12}),
    *of(
        "dbrx",
        "attn_config",
        {"text": {"kv_n_heads": "3"}, "odd": {"kv_n_heads": 4}},
        "config.json",
        num_key_value_heads=REMOVED,
    ),
    *of("phi3", "rope_parameters", {"list": [1, 2]}, "rope settings must be an object"),
    *of(
        "phi3", "rope_parameters", {"kinds": {"a": {"rope_type": "default"}, "b": {"rope_type": "spiral"}}}, "'spiral'"
    ),
    *of("minimax_m2", "rotary_dim", {"larger": 10, "odd": 3}),
    *of("stablelm", "qk_layernorm", {"text": "yes"}),
]

"""What the supported families differ in, as data. The only place that knows a family by its name.

Most is read from the config and the attention modules themselves (model_spec.py, attention.py). A family is listed with
what neither of them spells out; docs/families.md is made from this table and from the exactness test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one ``model_type`` that neither its config nor its modules spell out. The defaults are Llama's."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of config fields that a config.json may lack
    qkv_bias: bool | str = "attention_bias"  # a value, or the config field that holds it
    output_bias: bool | str = "attention_bias"
    qk_norm: bool | str = False  # of queries and keys
    norm_after_rope: bool = False
    fused: str = "concat"  # rows of a fused projection: 'concat' q, k, v; 'grouped' per kv head; 'codegen'
    rope: str | None = "half"  # which dims are a pair: 'half' i and i + P, 'interleaved' 2i and 2i + 1; None: no rope
    # 'all'; 'no_rope_layers' (config field); 'sliding': those with a window; 'sliding-or-all': the same, or all where
    # the model has no window; 'sliding-or-dense': also those with a plain MLP in a mixture of experts
    rope_layers: str = "all"
    rope_table: str = "halves"  # modeling/heads.py, rope_tables
    partial_rope: str | None = None  # config field: the part of a head that rope turns, a share or a number of dims
    all_layers_attend: bool = False  # beside whatever else they do: a list of layer types says nothing of attention
    inside: bool = False  # only inside a vision-language model (vision.py): never a checkpoint of its own
    optional_sliding_window: bool = False  # counts only with use_sliding_window, from layer max_window_layers on
    clip: bool = False  # queries, keys and values are clipped where the config has clip_qkv
    softcap: bool = False  # scores are capped where the config has attn_logit_softcapping
    scaling: float | None = None  # of scores; None: the module's own
    temperature: str | None = None  # of queries by position: 'llama4' or 'ministral3'
    position_bias: str | None = None  # modeling/heads.py, score_bias
    attends_in_chunks: bool = False  # a query of a layer with rope sees its own chunk of the tokens only
    batched: bool = True  # layers take the mask and position bias of one window for many
    gate_activation: str | None = None  # of a gate on the heads' output; None: sigmoid
    adds_residual: bool = False  # the attention module itself adds the residual stream
    beyond: str | None = None  # what its attention does that the latent attention of engines does not
    unserved: str | None = None  # what else keeps vLLM's transformers backend from running it
    plain_block: bool = False  # outside attention, Llama's: RMSNorms and a gated MLP (or its factors are config fields)
    says_kv_heads: bool = True  # a field of the config is the number of key/value heads, whatever it is
    # numbers of heads of the same size that its config can say: 'any', those that 'divide' hidden_size, or 'none', as
    # where a norm reads all heads at once or its other layers have as many
    fewer_heads: str = "any"
    fewer_neurons: bool = True  # a field of the config is the number of FFN neurons, and no norm reads them
    plain_residual: bool = True  # the attention's output is added to the stream as it is: no norm or factor between


GATE, OUTPUT_NORM = "a gate on the heads' output", "a norm before the output projection"
SINKS, _GAIN = "attention sinks", "norms with a weight after rope"
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_NEXT = {"partial_rotary_factor": 0.25, "full_attention_interval": 4}
_HALF_ROPE = {"partial_rotary_factor": 0.5}
# which layers attend to all tokens where layer_types is missing: the last of so many, or the first
_ALL_FULL, _EVERY_SECOND = {"sliding_window_pattern": 1}, {"sliding_window_pattern": 2}
_FIRST_OF_FOUR = {"full_attention_first_of": 4}
_GPT = Family(rope=None, qkv_bias=True, output_bias=True, says_kv_heads=False)
_QWEN2_VL = Family(inside=True, qkv_bias=True, output_bias=False, optional_sliding_window=True, fewer_heads="none")
_COHERE = Family(rope="interleaved", rope_table="repeated")
_PARTIAL = Family(partial_rope="partial_rotary_factor")
_HALF_ROPE_VL = replace(
    _PARTIAL, inside=True, rope="interleaved", rope_table="either", output_bias=False, plain_residual=False
)
_POST_NORM = Family(plain_residual=False)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(beyond=GATE, qk_norm=True, rope_layers="sliding", plain_residual=False),
    "apertus": Family(qk_norm=True),
    "apertus1p5_text": Family(qk_norm=True),
    "arcee": Family(fewer_heads="divide"),
    "aria_text": Family(fewer_heads="divide"),
    "bamba": replace(_PARTIAL, defaults=_HALF_ROPE),
    "biogpt": replace(_GPT, unserved="its head is not called lm_head, the only one that vLLM looks for"),
    "bitnet": Family(beyond=OUTPUT_NORM, fewer_neurons=False),
    "bloom": replace(
        _GPT, fused="grouped", position_bias="alibi", batched=False, adds_residual=True, fewer_neurons=False
    ),
    "codegen": Family(
        says_kv_heads=False,
        defaults={"rotary_dim": 64},
        fused="codegen",
        rope="interleaved",
        rope_table="sinusoids",
        partial_rope="rotary_dim",
        qkv_bias=False,
        output_bias=False,
    ),
    "cohere": replace(_COHERE, qk_norm="use_qk_norm"),
    "cohere2": replace(_COHERE, defaults={"sliding_window_pattern": 4}, rope_layers="sliding"),
    "cohere2_moe": replace(_COHERE, rope_layers="sliding-or-dense"),
    "cohere_compass_text": Family(defaults=_ALL_FULL),
    "cwm": Family(plain_block=True, defaults=_FIRST_OF_FOUR, fewer_heads="divide"),
    "dbrx": Family(says_kv_heads=False, clip=True, qkv_bias=False, output_bias=False),
    "dots1": Family(
        qk_norm=True, defaults={"use_sliding_window": True, "max_window_layers": 62}, optional_sliding_window=True
    ),
    "ernie4_5": Family(plain_block=True, rope="interleaved", qkv_bias="use_bias", output_bias="use_bias"),
    "ernie4_5_moe": Family(rope="interleaved", qkv_bias="use_bias", output_bias="use_bias"),
    "exaone": Family(fewer_heads="divide"),
    "exaone4": Family(
        defaults={"sliding_window_pattern": 4}, qk_norm=True, rope_layers="sliding-or-all", plain_residual=False
    ),
    "exaone_moe": Family(qk_norm=True, rope_layers="sliding-or-all", plain_residual=False),
    "falcon": Family(
        says_kv_heads=False,
        unserved="vLLM reads the cache's width from head_dim, which this family's config computes itself",
        defaults={"multi_query": True},
        fused="grouped",
        position_bias="scaled-alibi",
        batched=False,
        qkv_bias="bias",
        output_bias="bias",
    ),
    "falcon_h1": Family(all_layers_attend=True, plain_residual=False),
    "flex_olmo": Family(qk_norm=True, plain_residual=False, fewer_heads="none"),
    "flint": Family(beyond=SINKS, qk_norm=True, rope_layers="sliding"),
    "gemma": Family(),
    "gemma2": replace(_POST_NORM, softcap=True, defaults=_EVERY_SECOND, fewer_heads="divide"),
    "gemma3_text": Family(
        defaults={"sliding_window_pattern": 6}, qk_norm=True, plain_residual=False, fewer_heads="divide"
    ),
    "glm": replace(_PARTIAL, plain_block=True, defaults=_HALF_ROPE, rope="interleaved"),
    "glm4v_moe_text": replace(_PARTIAL, inside=True, defaults=_HALF_ROPE | {"attention_bias": True}, output_bias=False),
    "glm4v_text": replace(_HALF_ROPE_VL, qkv_bias=True, fewer_heads="none"),
    "glm_ocr_text": replace(_HALF_ROPE_VL, qkv_bias=False),
    "glm4": replace(_PARTIAL, defaults=_HALF_ROPE, rope="interleaved", plain_residual=False),
    "glm4_moe": replace(_PARTIAL, defaults=_HALF_ROPE, qk_norm="use_qk_norm"),
    "gpt2": _GPT,
    "gpt_bigcode": replace(_GPT, defaults={"multi_query": True}, fused="grouped"),
    "gpt_neo": replace(_GPT, qkv_bias=False, position_bias="window", scaling=1.0),
    "gpt_neox": Family(
        says_kv_heads=False,
        defaults={"rotary_pct": 0.25},
        fused="grouped",
        partial_rope="rotary_pct",
        qkv_bias=True,
        output_bias=True,
    ),
    "gpt_oss": Family(beyond=SINKS, defaults=_EVERY_SECOND),
    "gptj": Family(
        says_kv_heads=False,
        defaults={"rotary_dim": 64},
        rope="interleaved",
        rope_table="sinusoids",
        partial_rope="rotary_dim",
        qkv_bias=False,
        output_bias=False,
    ),
    "granite": replace(_POST_NORM, plain_block=True),
    "granite_docling_text": replace(_POST_NORM, inside=True),
    "granite_swa": replace(_POST_NORM, beyond=SINKS, defaults=_FIRST_OF_FOUR),
    "granitemoe": _POST_NORM,
    "granitemoe_swa": replace(_POST_NORM, beyond=SINKS, defaults=_FIRST_OF_FOUR),
    "granitemoehybrid": replace(_POST_NORM, defaults={"position_embedding_type": None}),
    "granitemoeshared": _POST_NORM,
    "helium": Family(plain_block=True, rope="interleaved", fewer_heads="none"),
    "hunyuan_v1_dense": Family(beyond=_GAIN, qk_norm=True, norm_after_rope=True),
    "hunyuan_v1_moe": Family(beyond=_GAIN, qk_norm=True, norm_after_rope=True),
    "hy_v3": Family(qk_norm=True),
    "hyperclovax": replace(_POST_NORM, fewer_heads="divide"),
    "internlm3": Family(fewer_heads="divide"),
    "iquestcoder": Family(fewer_heads="divide"),
    "jais2": Family(fewer_heads="divide"),
    "jamba": Family(defaults={"attn_layer_period": 8, "attn_layer_offset": 4}, rope=None),
    "kolibri1": Family(qk_norm=True),
    "laguna": replace(
        _PARTIAL, defaults=_ALL_FULL, beyond=GATE, qk_norm=True, gate_activation="softplus", fewer_heads="none"
    ),
    "lfm2": Family(qk_norm=True, fewer_neurons=False),
    "lfm2_moe": Family(qk_norm=True),
    "lfm3": Family(beyond=GATE, qk_norm=True),
    "llama": Family(plain_block=True, fewer_heads="divide"),
    "lara_mini": Family(qk_norm=True, rope_layers="sliding"),
    "llama4_text": Family(
        defaults={"use_qk_norm": True, "attention_chunk_size": 8192},
        rope="interleaved",
        rope_table="complex",
        rope_layers="no_rope_layers",
        qk_norm="use_qk_norm",
        temperature="llama4",
        attends_in_chunks=True,
    ),
    "mellum": Family(qk_norm=True, defaults=_ALL_FULL),
    "minimax": replace(_POST_NORM, fewer_heads="none"),
    "minimax_m2": replace(_PARTIAL, qk_norm=True, fewer_heads="none"),
    "minimax_m3_vl_text": Family(qk_norm=True),
    "ministral": Family(plain_block=True),
    "ministral3": Family(temperature="ministral3"),
    "mistral": Family(plain_block=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family(),
    "modernbert-decoder": Family(says_kv_heads=False, defaults={"sliding_window": 64, "full_attention_first_of": 3}),
    "mpt": Family(says_kv_heads=False, rope=None, clip=True, batched=False, position_bias="mpt", fewer_neurons=False),
    "nanochat": Family(qk_norm=True, norm_after_rope=True, rope_table="backwards"),
    "nemotron": replace(_PARTIAL, defaults=_HALF_ROPE),
    "nemotron_h": Family(rope=None),
    "olmo": Family(clip=True),
    "olmo2": Family(qk_norm=True, plain_residual=False, fewer_heads="none"),
    "olmo3": Family(qk_norm=True, plain_residual=False, fewer_heads="none"),
    "olmo_hybrid": Family(qk_norm=True, plain_residual=False, fewer_heads="none"),
    "olmoe": Family(qk_norm=True, clip=True, fewer_heads="none"),
    "opt": replace(_GPT, qkv_bias="enable_bias", output_bias="enable_bias"),
    "paddleocr_vl_text": Family(inside=True, qkv_bias="use_bias", output_bias="use_bias"),
    "persimmon": replace(
        _PARTIAL,
        says_kv_heads=False,
        defaults=_HALF_ROPE,
        fused="grouped",
        qk_norm="qk_layernorm",
        qkv_bias=True,
        output_bias=True,
    ),
    "phi": replace(
        _PARTIAL, defaults=_HALF_ROPE, qk_norm="qk_layernorm", qkv_bias=True, output_bias=True, fewer_heads="none"
    ),
    "phi3": replace(_PARTIAL, plain_block=True, qkv_bias=False, output_bias=False),
    "phimoe": Family(),
    "qwen2": Family(plain_block=True, defaults=_QWEN, qkv_bias=True, output_bias=False, optional_sliding_window=True),
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_moe": Family(defaults=_QWEN, qkv_bias="qkv_bias", output_bias=False, optional_sliding_window=True),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": Family(plain_block=True, defaults=_QWEN | {"head_dim": 128}, qk_norm=True, optional_sliding_window=True),
    "qwen3_5_moe_text": replace(_PARTIAL, beyond=GATE, defaults=_QWEN_NEXT, qk_norm=True),
    "qwen3_5_text": replace(_PARTIAL, beyond=GATE, defaults=_QWEN_NEXT, qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, optional_sliding_window=True),
    "qwen3_vl_moe_text": Family(inside=True, qk_norm=True),
    "qwen3_vl_text": Family(inside=True, qk_norm=True),
    "qwen3_next": replace(_PARTIAL, beyond=GATE, defaults=_QWEN_NEXT, qk_norm=True),
    "seed_oss": Family(plain_block=True, qkv_bias="attention_bias", output_bias="attention_out_bias"),
    "sarvam_moe": replace(_PARTIAL, qk_norm="use_qk_norm"),
    "smollm3": Family(plain_block=True, rope_layers="no_rope_layers"),
    "solar_open": _PARTIAL,
    "stablelm": replace(_PARTIAL, defaults={"partial_rotary_factor": 0.25}, qk_norm="qk_layernorm", fewer_heads="none"),
    "starcoder2": Family(qkv_bias="use_bias", output_bias="use_bias"),
    "vaultgemma": replace(_POST_NORM, softcap=True, defaults=_EVERY_SECOND, fewer_heads="divide"),
    "xglm": replace(_GPT, batched=False),
}

TEXT_ONLY_INSIDE = frozenset(name for name, family in FAMILIES.items() if family.inside)

_ENCODER = "a bidirectional encoder with a causal head, not a decoder that serves text"
_HALF = "the decoder half of an encoder-decoder, with cross-attention"
_MLA = "already multi-head latent attention"
# whose layers, in some release of transformers, give their attention known arguments only
DROP_ARGUMENTS = frozenset(
    ("bloom", "codegen", "falcon", "falcon_h1", "gpt_neo", "gptj", "mpt", "nemotron", "stablelm")
)
# whose decoder layers no config and number alone make: the model's constructor says more
LAYERS_BY_MODEL = frozenset(("bamba", "falcon_h1"))
OWN_CACHE = (  # of families where all_layers_attend
    "its layers mix tokens beside attention too, and transformers has a cache of its own kind for them"
)
_NO_CACHE = "no softmax attention: there is no KV cache to shrink"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "git",
            "megatron-bert",
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ),
        _HALF,
    ),
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_v4",
            "dots3_note",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "hy_v4",
            "kimi_linear",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        _MLA,
    ),
    "beam": "its queries are scaled by what the model computes beside attention",
    "blt": "bytes are attended to in patches by several models in one",
    "cpmant": "its attention takes a learned position bias of segments, which no cache of ours holds",
    "ctrl": "its attention takes queries, keys and values from three inputs",
    "diffllama": "differential attention: two softmaxes that share values",
    "doge": "its mask is computed from the values, which a latent cache does not keep",
    **dict.fromkeys(
        (
            "gemma3n",
            "gemma3n_text",
            "gemma4",
            "gemma4_assistant",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_assistant",
            "gemma4_unified_text",
        ),
        "layers share their keys and values",
    ),
    **dict.fromkeys(
        ("emu3", "fuyu", "moss_transcribe_diarize", "phi4_multimodal"),
        "a multi-modal model that anymla has no test of",
    ),
    "gpt_neox_japanese": "its attention hands its output bias to the layer instead of adding it",
    **dict.fromkeys(("dory", "hrm_text"), "layers run several times per token, each with a cache of its own"),
    **dict.fromkeys(
        ("inkling2_loop_text", "inkling2_text", "inkling_text"), "keys and values pass a convolution over tokens"
    ),
    "jetmoe": "queries and outputs pass through experts (mixture of attention heads)",
    "mimo_v2_flash": "values are wider than keys",
    "mllama": "cross-attention layers on images between the text layers",
    "moshi": "projections of each codebook of their own",
    "hunyuan_vl": "on images, rope rotates the two dims of a pair by different angles",
    "openai-gpt": "transformers runs it without a KV cache",
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "an indexer beside the keys chooses what is attended to"),
    "recurrent_gemma": "its attention keeps a cache of its own, which transformers' caches do not hold",
    **dict.fromkeys(("zamba", "zamba2"), "one attention block serves several layers, on inputs of twice the width"),
    "zaya": "keys and values pass a convolution over tokens",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), _NO_CACHE),
}

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")

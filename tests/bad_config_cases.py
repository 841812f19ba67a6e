"""Bad config.json files."""

import pickle

from tests.damage import (
    CONFIG_FILE,
    CONVERT,
    EVAL,
    GENERATE,
    INSPECT,
    PLAN,
    REMOVED,
    Case,
    all_of,
    config,
    file,
    folder,
    in_text,
    link,
    on_each,
    remove,
    sparse,
)

CONFIG_FILES = on_each(
    {"inspect": INSPECT, "plan": PLAN, "convert": CONVERT, "eval": f"{EVAL} {{valid}}", "generate": f"{GENERATE} Once"},
    [
        Case("config-missing", "", ("{model}", "no config.json"), remove("model/config.json")),
        Case("config-not-json", "", ("{model}/config.json", "JSON"), file("model/config.json", "{model_type: llama}")),
        Case("config-empty", "", ("{model}/config.json", "JSON"), file("model/config.json", "")),
        Case("config-no-object", "", ("{model}/config.json", "no JSON object"), file("model/config.json", "[1, 2]")),
        Case("config-not-utf8", "", ("{model}/config.json",), file("model/config.json", b'{"model_type": "\xff"}')),
        Case("config-nested", "", ("{model}/config.json",), file("model/config.json", 100_000 * "[")),
        Case("config-byte-order", "", ("{model}/config.json", "BOM"), file("model/config.json", b"\xef\xbb\xbf{}")),
        Case("config-utf16", "", ("{model}/config.json", "JSON"), file("model/config.json", "{}".encode("utf-16"))),
        Case("config-two", "", ("{model}/config.json", "JSON"), file("model/config.json", "{}{}")),
        Case("config-nul", "", ("{model}/config.json", "JSON"), file("model/config.json", 4096 * b"\0")),
        Case("config-pickled", "", ("{model}/config.json",), file("model/config.json", pickle.dumps({"a": 1}))),
        Case("config-null", "", ("{model}/config.json", "no JSON object"), file("model/config.json", "null")),
        Case("config-huge", "", ("{model}/config.json", "70 MiB", "too large"), sparse("model/config.json", 70 << 20)),
        Case(
            "config-a-folder",
            "",
            ("{model}", "no config.json"),
            all_of(remove("model/config.json"), folder("model/config.json")),
        ),
        Case(
            "config-linked-to-itself",
            "",
            ("{model}", "no config.json"),
            all_of(remove("model/config.json"), link("model/config.json", "model/config.json")),
        ),
        Case(
            "config-linked-to-nothing",
            "",
            ("{model}", "no config.json"),
            all_of(remove("model/config.json"), link("model/config.json", "gone")),
        ),
        Case(
            "config-device",
            "",
            ("{model}", "no config.json"),
            all_of(remove("model/config.json"), link("model/config.json", "/dev/zero")),
        ),
        Case("config-digits", "", ("{model}/config.json",), file("model/config.json", f'{{"a": {5000 * "9"}}}')),
    ],
)

SIZE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
NO_SIZES = {"zero": 0, "negative": -64, "huge": 10**18, "text": "8", "fraction": 1.5, "list": [8], "bool": True}
SIZES = [
    Case(f"{field}-{kind}", "", (CONFIG_FILE, field, str(value)), config(**{field: value}))
    for field in SIZE_FIELDS
    for kind, value in NO_SIZES.items()
]

SPIRAL = {"rope_type": "spiral", "rope_theta": 10000.0}
REFUSED_CONFIGS = [
    Case("family-unknown", "", ("'lama'", "not known", "llama", "docs/families.md"), config(model_type="lama")),
    Case("family-like-none", "", ("'zzz'", "not known", "docs/families.md"), config(model_type="zzz")),
    Case("family-encoder", "", ("'bert'", "bidirectional encoder"), config(model_type="bert")),
    Case("family-half", "", ("'bart'", "encoder-decoder"), config(model_type="bart")),
    Case("family-without-cache", "", ("'mamba2'", "no KV cache"), config(model_type="mamba2")),
    Case("family-long", "", ("'aaaa", "not known"), config(model_type=5000 * "a")),
    Case("family-unprintable", "", ("x1b[2J", "not known"), config(model_type="\x1b[2J\ud800\nllama")),
    Case("family-markup", "", ("[/bold]", "not known"), config(model_type="[/bold]")),
    Case("family-missing", "", ("model_type",), config(model_type=REMOVED)),
    Case("family-not-text", "", ("model_type",), config(model_type=["llama"])),
    Case("encoder-decoder", "", ("'t5'", "encoder-decoder"), config(model_type="t5", is_encoder_decoder=True)),
    Case("mla-deepseek", "", ("already", "kv_lora_rank 512"), config(model_type="deepseek_v3", kv_lora_rank=512)),
    Case("mla-anymla", "", ("already", "anymla"), config(model_type="anymla_llama", kv_lora_rank=12)),
    Case("quantised", "", ("quantised", "hqq"), config(quantization_config={"quant_method": "hqq", "bits": 4})),
    Case("size-missing", "", (CONFIG_FILE, "hidden_size", "required"), config(hidden_size=REMOVED)),
    Case("heads-not-divisible", "", ("num_attention_heads 8", "num_key_value_heads 3"), config(num_key_value_heads=3)),
    Case(
        "width-not-divisible",
        "",
        ("hidden_size 64", "num_attention_heads 12"),
        config(head_dim=REMOVED, num_attention_heads=12),
    ),
    Case("head-dim-odd", "", ("head_dim 7",), config(head_dim=7)),
    Case("head-dim-odd-derived", "", ("head_dim 5",), config(head_dim=REMOVED, hidden_size=40)),
    Case(
        "size-twice",
        "",
        (CONFIG_FILE, "hidden_size", "-1"),
        in_text('"hidden_size"', '"hidden_size": 64, "hidden_size": -1, "x"'),
    ),
    Case("size-1e400", "", (CONFIG_FILE, "hidden_size", "inf"), in_text('"hidden_size": 64', '"hidden_size": 1e400')),
    Case("size-nan", "", (CONFIG_FILE, "vocab_size", "nan"), in_text('"vocab_size": 512', '"vocab_size": NaN')),
    Case("size-400-digits", "", (CONFIG_FILE, "hidden_size", "no model"), config(hidden_size=10**400)),
    Case(
        "size-deep",
        "",
        (CONFIG_FILE, "hidden_size", "[[["),
        in_text('"hidden_size": 64', f'"hidden_size": {500 * "["}{500 * "]"}'),
    ),
    Case("flag-text", "", (CONFIG_FILE, "attention_bias", "'no'"), config(attention_bias="no")),
    Case("tied-text", "", (CONFIG_FILE, "tie_word_embeddings", "'yes'"), config(tie_word_embeddings="yes")),
    Case("experts-huge", "", (CONFIG_FILE, "num_experts", "10000"), config(num_experts=10**9)),
    Case(
        "nested-size-huge",
        "",
        (CONFIG_FILE, "vision_config.hidden_size"),
        config(vision_config={"hidden_size": 10**12}),
    ),
    Case("labels-billion", "", (CONFIG_FILE, "num_labels", "10000"), config(num_labels=10**9)),
    Case(
        "kernel-from-the-hub", "", (CONFIG_FILE, "'evil/kernel'", "not run"), config(_attn_implementation="evil/kernel")
    ),
    Case("kernel-in-parts", "", (CONFIG_FILE, "'evil/kernel'"), config(attn_implementation={"text": "evil/kernel"})),
    Case("dtype-list", "", (CONFIG_FILE, "dtype", "['float32']"), config(dtype=["float32"])),
    Case("dtype-long", "", (CONFIG_FILE, "dtype", "aaa"), config(dtype=5000 * "a")),
    Case("quantised-oddly", "", ("quantised", "unknown"), config(quantization_config="int4")),
    Case("dtype-unknown", "", (CONFIG_FILE, "dtype", "int8"), config(dtype="int8")),
    Case("rope-unknown", "", ("rope type", "'spiral'", "yarn"), config(rope_parameters=SPIRAL)),
    Case("rope-no-object", "", (CONFIG_FILE, "rope", "'linear'"), config(rope_parameters="linear")),
    Case("rope-theta-text", "", ("rope_theta", "'big'"), config(rope_parameters={"rope_theta": "big"})),
    Case("rope-theta-zero", "", ("rope_theta", "0"), config(rope_parameters={"rope_theta": 0})),
    Case("rope-theta-nan", "", ("rope_theta", "nan"), config(rope_parameters={"rope_theta": float("nan")})),
    Case("rope-factor-zero", "", ("rope", "factor", "0"), config(rope_parameters={"rope_type": "linear", "factor": 0})),
    Case("rope-theta-inf", "", ("rope_theta", "inf"), config(rope_parameters={"rope_theta": float("inf")})),
    Case("rope-theta-huge", "", ("rope_theta", "1000"), config(rope_parameters={"rope_theta": 10**400})),
    Case("rope-theta-bool", "", ("rope_theta", "True"), config(rope_parameters={"rope_theta": True})),
    Case("rope-type-list", "", ("rope type", "['yarn']"), config(rope_parameters={"rope_type": ["yarn"]})),
    Case("rope-type-long", "", ("rope type", "aaa"), config(rope_parameters={"rope_type": 5000 * "a"})),
    Case("rope-scaling-list", "", ("rope settings", "[1]"), config(rope_parameters=REMOVED, rope_scaling=[1])),
    Case("rope-scaling-old", "", ("rope type", "'su'"), config(rope_parameters=REMOVED, rope_scaling={"type": "su"})),
    Case(
        "rope-factor-text", "", ("rope factor", "'2'"), config(rope_parameters={"rope_type": "linear", "factor": "2"})
    ),
]

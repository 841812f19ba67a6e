"""Bad weight files and what lies beside them."""

import json
from typing import Any

from tests.bad_tensor_cases import FAMILY_WEIGHTS, TENSORS
from tests.damage import (
    CONVERT,
    EVAL,
    GENERATE,
    INDEX_FILE,
    MODEL_FILE,
    SHARD,
    TRAIN,
    UP_PROJ,
    V_PROJ,
    Case,
    Damage,
    all_of,
    appended,
    config,
    eager_tokenizer,
    file,
    flipped,
    folder,
    header,
    index,
    link,
    number,
    only_pickled,
    pickled_shard,
    remove,
    row_less,
    shards,
    single_file_and_index,
    tensors,
    truncated,
    two_shards,
)


def entry(name: str, **changes: Any) -> Damage:
    """Changes what the header says of a tensor."""
    return header(lambda fields: fields[name].update(changes))


BROKEN = (f"{{model}}/{MODEL_FILE}", "not a safetensors file")
HEADERS = [
    Case("header-not-json", CONVERT, BROKEN, header(lambda fields: "{not json")),
    Case("header-not-utf8", CONVERT, BROKEN, flipped(8 * 100 + 7)),
    Case("header-a-list", CONVERT, BROKEN, header(lambda fields: "[]")),
    Case("header-empty", CONVERT, BROKEN, header(lambda fields: "")),
    Case("header-nested", CONVERT, BROKEN, header(lambda fields: 100_000 * "[")),
    Case("header-length-huge", CONVERT, BROKEN, flipped(63)),
    Case("header-length-large", CONVERT, BROKEN, flipped(35)),
    Case("header-length-short", CONVERT, BROKEN, flipped(3)),
    Case("header-bit", f"{GENERATE} Once", BROKEN, flipped(8 * 8)),
    Case("header-bit-eval", f"{EVAL} {{valid}}", BROKEN, flipped(8 * 8)),
    Case("offsets-overlap", CONVERT, BROKEN, entry(V_PROJ, data_offsets=[0, 8192])),
    Case("offsets-outside", CONVERT, BROKEN, entry(V_PROJ, data_offsets=[1 << 40, (1 << 40) + 8192])),
    Case("offsets-backwards", CONVERT, BROKEN, entry(V_PROJ, data_offsets=[8192, 0])),
    Case("offsets-negative", CONVERT, BROKEN, entry(V_PROJ, data_offsets=[-8192, 0])),
    Case("shape-of-another-size", CONVERT, BROKEN, entry(V_PROJ, shape=[32, 65])),
    Case("shape-negative", CONVERT, BROKEN, entry(V_PROJ, shape=[-32, -64])),
    Case("shape-overflow", CONVERT, BROKEN, entry(V_PROJ, shape=[1 << 40, 1 << 40])),
    Case("shape-text", CONVERT, BROKEN, entry(V_PROJ, shape="32x64")),
    Case("dtype-of-no-kind", CONVERT, BROKEN, entry(V_PROJ, dtype="F31")),
    Case("dtype-of-half-size", CONVERT, BROKEN, entry(V_PROJ, dtype="F16")),
    Case("bytes-after-the-end", CONVERT, BROKEN, appended(b"more")),
]

INDICES = [
    Case("shard-parent", CONVERT, (INDEX_FILE, "outside", "'..'"), shards(x="..")),
    Case("shard-nameless", CONVERT, (INDEX_FILE, "outside", "''"), shards(x="")),
    Case("shard-folder", CONVERT, ("{model}", "lacks", "deep/a.safetensors"), shards(x="deep/a.safetensors")),
    Case("shard-backslash", CONVERT, (INDEX_FILE, "outside", "evil"), shards(x="..\\evil.safetensors")),
    Case("shard-nul", CONVERT, (INDEX_FILE, "outside", "x00"), shards(x="a.safetensors\0.bin")),
    Case("shard-home", CONVERT, (INDEX_FILE, "outside", "~/"), shards(x="~/evil.safetensors")),
    Case("shard-url", CONVERT, (INDEX_FILE, "outside", "http"), shards(x="http://evil/a.safetensors")),
    Case("shard-unprintable", CONVERT, ("{model}", "lacks", "x1b"), shards(x="\x1b[2J.safetensors")),
    Case("shard-name-long", CONVERT, ("{model}", "lacks", "aaa"), shards(x=5000 * "a")),
    Case("shard-list", CONVERT, (INDEX_FILE, "file name"), shards(x=["a.safetensors"])),
    Case("shard-null", CONVERT, (INDEX_FILE, "file name"), shards(x=None)),
    Case("shard-a-folder", CONVERT, ("{model}", "lacks", "'b'"), all_of(shards(x="b"), folder("model/b"))),
    Case("shard-pickled", CONVERT, ("{model}/b.bin", "not a safetensors file"), pickled_shard),
    Case(
        "shard-link-to-other-file",
        CONVERT,
        ("{model}/b.safetensors", "not a safetensors file"),
        all_of(shards(x="b.safetensors"), link("model/b.safetensors", str(TRAIN))),
    ),
    Case(
        "shard-link-to-nothing",
        CONVERT,
        ("{model}", "lacks", "b.safetensors"),
        all_of(shards(x="b.safetensors"), link("model/b.safetensors", "gone")),
    ),
    Case(
        "shard-twice",
        CONVERT,
        ("{model}/b.safetensors", "a.safetensors as well"),
        two_shards(x="a.safetensors", y="b.safetensors"),
    ),
    Case("index-names-no-tensor", CONVERT, (INDEX_FILE, "'x'", "does not hold"), shards(x="a.safetensors")),
    Case(
        "index-names-no-tensor-eval",
        f"{EVAL} {{valid}}",
        (INDEX_FILE, "'x'", "does not hold"),
        shards(x="a.safetensors"),
    ),
    Case("index-map-a-list", CONVERT, (INDEX_FILE, "weight_map"), index('{"weight_map": ["a.safetensors"]}')),
    Case("index-not-utf8", CONVERT, (INDEX_FILE,), index(b'{"weight_map": {"x": "\xff"}}')),
    Case("index-empty", CONVERT, (INDEX_FILE,), index("")),
]

BAD_GENERATION = [
    {"eos_token_id": "y"},
    {"max_length": "x", "bos_token_id": 1, "eos_token_id": ["2"]},
    {"num_beams": 0},
    {"max_new_tokens": -5},
    {"top_k": "x", "do_sample": True},
    {"repetition_penalty": "x"},
    {"stop_strings": ["a"]},
    {"max_time": "x"},
    {"bad_words_ids": [["a"]]},
    {"cache_implementation": "x"},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"watermarking_config": {"a": 1}},
]
GENERATION = [
    Case(
        f"generation-{next(iter(settings))}",
        f"{GENERATE} Once",
        ("{model}",),
        file("model/generation_config.json", json.dumps(settings)),
    )
    for settings in BAD_GENERATION
]

TOKENIZER = ("{model}", "tokenizer")
COMPANIONS = [
    Case(f"{name.split('.')[0]}-{kind}", command, words, file(f"model/{name}", content))
    for name, command, words, contents in [
        (
            "tokenizer.json",
            CONVERT,
            TOKENIZER,
            {
                "empty": "",
                "list": "[]",
                "cut": '{"version": "1.0", "model": {',
                "bytes": b"\xff\xfe\0",
                "nested": 10_000 * "[",
            },
        ),
        (
            "tokenizer_config.json",
            f"{GENERATE} Once",
            TOKENIZER,
            {
                "empty": "",
                "list": "[1]",
                "cut": '{"a": ',
                "bytes": b"\xff",
                "number": '{"model_max_length": "x", "bos_token": 7}',
            },
        ),
        ("special_tokens_map.json", f"{EVAL} {{valid}}", TOKENIZER, {"cut": "{", "list": "[1]"}),
        (
            "generation_config.json",
            CONVERT,
            ("{model}",),
            {"cut": "{", "list": "[1]", "empty": ""},
        ),
    ]
    for kind, content in contents.items()
]


WEIGHTS = [
    Case("weights-cut-in-half", CONVERT, (f"{{model}}/{MODEL_FILE}", "truncated"), truncated(500_000)),
    Case("weights-cut-in-header", CONVERT, (f"{{model}}/{MODEL_FILE}", "truncated"), truncated(100)),
    Case("weights-empty", CONVERT, (f"{{model}}/{MODEL_FILE}", "truncated"), truncated(0)),
    Case("weights-garbage", CONVERT, (f"{{model}}/{MODEL_FILE}",), file(f"model/{MODEL_FILE}", 9000 * b"\xfe")),
    Case("weights-missing", CONVERT, ("{model}", MODEL_FILE), remove(f"model/{MODEL_FILE}")),
    Case("weights-broken-beside-shards", CONVERT, (f"{{model}}/{MODEL_FILE}",), single_file_and_index),
    Case("shard-missing", CONVERT, ("{model}", "shard", "b.safetensors"), shards(x="a.safetensors", y="b.safetensors")),
    Case(
        "shard-cut", CONVERT, (SHARD, "truncated"), all_of(shards(x="a.safetensors"), truncated(900, "a.safetensors"))
    ),
    Case("shard-outside", CONVERT, (INDEX_FILE, "outside", "../evil.safetensors"), shards(x="../evil.safetensors")),
    Case("shard-absolute", CONVERT, (INDEX_FILE, "outside", "/evil.safetensors"), shards(x="/evil.safetensors")),
    Case("shard-no-name", CONVERT, (INDEX_FILE,), shards(x=1)),
    Case("index-not-json", CONVERT, (INDEX_FILE,), index("{")),
    Case("index-nested", CONVERT, (INDEX_FILE,), index(100_000 * "[")),
    Case("index-without-map", CONVERT, (INDEX_FILE,), index('{"metadata": {}}')),
    Case("index-no-object", CONVERT, (INDEX_FILE,), index('["a.safetensors"]')),
    Case("index-empty-map", CONVERT, (INDEX_FILE,), shards()),
    Case("weights-pickled", CONVERT, ("{model}", "pickled", ".bin", "safetensors"), only_pickled),
    Case("weights-pickled-generate", f"{GENERATE} Once", ("{model}", "pickled", ".bin"), only_pickled),
    Case("weights-pickled-eval", f"{EVAL} {{valid}}", ("{model}", "pickled", ".bin"), only_pickled),
    Case("tensor-nan", CONVERT, ("{model}", UP_PROJ, "NaN"), number(UP_PROJ, float("nan"))),
    Case("tensor-inf", CONVERT, ("{model}", V_PROJ, "infinity"), number(V_PROJ, float("inf"))),
    Case("tensor-overflow", f"{CONVERT} --dtype float16", (UP_PROJ, "infinity"), number(UP_PROJ, 1e6)),
    Case("tensor-missing", CONVERT, ("{model}", V_PROJ), tensors(lambda state: state.pop(V_PROJ))),
    Case("tensor-shape", CONVERT, ("{model}", V_PROJ, "shape"), row_less(V_PROJ)),
    Case("tensor-nan-eval", f"{EVAL} {{valid}}", (UP_PROJ, "NaN"), number(UP_PROJ, float("nan"))),
    Case("tensor-missing-generate", f"{GENERATE} Once", (V_PROJ,), tensors(lambda state: state.pop(V_PROJ))),
    Case("layer-missing", CONVERT, ("model.layers.5.",), config(num_hidden_layers=6)),
    Case("size-of-another-model", CONVERT, ("{model}", "shape", "mlp"), config(intermediate_size=180)),
    Case("tokenizer-missing", CONVERT, ("{model}", "tokenizer"), remove("model/tokenizer.json")),
    Case("tokenizer-broken", CONVERT, ("{model}", "tokenizer"), file("model/tokenizer.json", "{}")),
    Case("tokenizer-of-another-model", CONVERT, ("{model}", "tokenizer", "512"), eager_tokenizer),
    *HEADERS,
    *INDICES,
    *TENSORS,
    *FAMILY_WEIGHTS,
    *COMPANIONS,
    *GENERATION,
]

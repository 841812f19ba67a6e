"""What can be wrong with anymla's input, and the table of all cases."""

from tests.bad_config_cases import CONFIG_FILES, REFUSED_CONFIGS, SIZES, SPIRAL
from tests.bad_family_cases import FAMILY_CONFIGS
from tests.bad_weight_cases import WEIGHTS
from tests.bad_yaml_cases import PLANS, RECIPES
from tests.damage import (
    CONVERT,
    EVAL,
    GENERATE,
    ON_TEXT,
    PLAN,
    ROW,
    Case,
    config,
    file,
    folder,
    larger_vocabulary,
    link,
    on_each,
    silent_tokenizer,
    text,
)

MODEL_PLACES = [
    Case("folder-missing-inspect", "inspect {tmp}/nowhere", ("{tmp}/nowhere",)),
    Case("folder-missing-plan", "plan {tmp}/nowhere", ("{tmp}/nowhere",)),
    Case("folder-missing-convert", CONVERT.replace("{model}", "{tmp}/nowhere"), ("{tmp}/nowhere",)),
    Case("folder-missing-eval", "eval {tmp}/nowhere --text {valid}", ("{tmp}/nowhere",)),
    Case("folder-missing-generate", "generate {tmp}/nowhere --prompt Once", ("{tmp}/nowhere",)),
    Case("folder-name-too-long", "plan {tmp}/" + 300 * "a", ("{tmp}/aaaa",)),
    Case("hub-id-offline", "plan nobody/nothing", ("nobody/nothing", "hub")),
    Case("file-for-a-folder-plan", "plan {train}", ("{train}", "not a folder")),
    Case("file-for-a-folder-convert", CONVERT.replace("{model}", "{valid}"), ("{valid}", "not a folder")),
]

IMPOSSIBLE_BUDGETS = [
    "--kv-cache 0.01 --codec none",
    "--kv-cache 0.05 --rope high",
    "--kv-cache 0.1 --rope uniform --rope-dims 8",
    "--kv-cache 0.1 --rope-dims 10",
    "--kv-cache 0.1 --kv-rank 12",
    "--kv-rank 62",
    "--kv-rank 56 --rope low",
]

SETTINGS = [
    Case("kv-cache-0", f"{PLAN} --kv-cache 0", ("kv-cache", "greater than 0")),
    Case("kv-cache-above-1", f"{PLAN} --kv-cache 1.5", ("kv-cache", "1.5")),
    Case("kv-cache-negative", f"{CONVERT} --kv-cache -1", ("kv-cache", "-1")),
    Case("kv-cache-nan", f"{CONVERT} --kv-cache nan", ("kv-cache", "nan")),
    Case("kv-cache-word", f"{PLAN} --kv-cache most", ("--kv-cache", "number")),
    Case("budget-too-small", f"{CONVERT} --kv-cache 0.01", ("--kv-cache 0.01", "layer 0", "--kv-cache 0.0469")),
    Case("rope-dims-odd", f"{CONVERT} --rope-dims 3", ("--rope-dims 3", "odd", "32")),
    Case("rope-dims-odd-high", f"{PLAN} --rope high --rope-dims 3", ("--rope-dims 3", "odd", "8")),
    Case("rope-dims-large", f"{CONVERT} --rope-dims 34", ("--rope-dims 34", "32")),
    Case("rope-dims-large-high", f"{PLAN} --rope high --rope-dims 10", ("--rope-dims 10", "8")),
    Case("rope-dims-negative", f"{PLAN} --rope-dims -2", ("rope-dims", "-2")),
    Case("kv-rank-0", f"{PLAN} --kv-rank 0", ("kv-rank", "0")),
    Case("kv-rank-large", f"{CONVERT} --kv-rank 65", ("--kv-rank 65", "64")),
    Case("kv-rank-leaves-no-room", f"{PLAN} --kv-rank 64", ("--kv-rank 64", "62")),
    Case("rope-unknown-option", f"{CONVERT} --rope spiral", ("--rope", "'spiral'", "channel-pca")),
    Case("factorization-unknown", f"{PLAN} --factorization qr", ("--factorization", "'qr'", "joint-svd")),
    Case("dtype-unknown-option", f"{CONVERT} --dtype int8", ("--dtype", "'int8'", "bfloat16")),
    Case("device-unknown", f"{CONVERT} --device nonsense", ("--device nonsense",)),
    Case("device-empty", f"{CONVERT} --device {{empty}}", ("--device",)),
    Case("device-without-numbers", f"{CONVERT} --device meta", ("--device meta",)),
    Case("device-without-module", f"{GENERATE} Once --device hpu", ("--device hpu",)),
    Case("device-unknown-eval", f"{EVAL} {{valid}} --device nonsense", ("--device nonsense",)),
    Case("seed-negative", f"{PLAN} --seed -1", ("seed", "-1")),
    Case("calibration-tokens-few", f"{PLAN} --calibration-tokens 10", ("calibration-tokens", "256")),
    Case("calibration-length-short", f"{PLAN} --calibration-length 2", ("calibration-length", "8")),
    Case("shard-size-word", f"{CONVERT} --max-shard-size big", ("--max-shard-size", "big")),
]

BAD_ROW, BAD_TEXT = 2 * ROW + "{text: cat}\n" + ROW, 2 * ROW + '{"story": "cat"}\n'
ON_ROWS = f"{ON_TEXT}.jsonl"
TEXTS = [
    Case("text-missing", f"{ON_TEXT}.txt", ("{tmp}/text.txt",)),
    Case("text-folder", ON_TEXT, ("{tmp}/text", "file"), folder("text")),
    Case("text-nameless", f"{CONVERT} --calibration {{empty}}", ("calibration",)),
    Case("text-empty", ON_TEXT, ("{tmp}/text", "empty"), text("")),
    Case("text-blank", ON_TEXT, ("{tmp}/text", "empty"), text(" \n\t\n<|endoftext|>\n  ")),
    Case("text-tiny", ON_TEXT, ("{tmp}/text", "256"), text("Once upon a time there was a cat.")),
    Case("text-not-utf8", ON_TEXT, ("{tmp}/text", "UTF-8", "byte 4000"), text(4000 * b"a" + b"\xff" + 4000 * b"a")),
    Case("rows-missing", ON_ROWS, ("{tmp}/text.jsonl",)),
    Case("rows-not-json", ON_ROWS, ("{tmp}/text.jsonl", "line 3"), text(BAD_ROW, "text.jsonl")),
    Case("rows-without-text", ON_ROWS, ("{tmp}/text.jsonl", "'text'", "line 3"), text(BAD_TEXT, "text.jsonl")),
    Case("rows-no-objects", ON_ROWS, ("{tmp}/text.jsonl", "'text'", "line 1"), text("[1]\n", "text.jsonl")),
    Case("rows-null", ON_ROWS, ("{tmp}/text.jsonl", "'text'", "line 1"), text(90 * '{"text": null}\n', "text.jsonl")),
    Case("rows-empty", ON_ROWS, ("{tmp}/text.jsonl", "empty"), text("\n\n", "text.jsonl")),
    Case("text-without-tokens", CONVERT, ("{train}", "0 tokens"), silent_tokenizer),
]

OUTPUTS = [
    Case("out-exists", CONVERT, ("{out}", "exists", "--overwrite"), file("out/mine.txt", "mine")),
    Case("out-is-a-file", f"{CONVERT} --overwrite", ("{out}", "file"), file("out", "mine")),
    Case("out-is-the-source", f"{CONVERT} -o {{model}} --overwrite", ("{model}", "source")),
    Case("out-links-to-the-source", f"{CONVERT} --overwrite", ("{out}", "source"), link("out", "model")),
    Case("out-in-the-source", f"{CONVERT} -o {{model}}/out", ("{model}/out", "source")),
    Case("out-deep-in-the-source", f"{CONVERT} -o {{model}}/a/b/out", ("{model}/a/b/out", "source")),
    Case("out-holds-the-source", f"{CONVERT} -o {{tmp}} --overwrite", ("{tmp}", "source")),
    Case("out-below-a-file", f"{CONVERT} -o {{tmp}}/file/out", ("{tmp}/file/out", "folder"), file("file", "mine")),
    Case("out-far-below-a-file", f"{CONVERT} -o {{tmp}}/file/a/b", ("{tmp}/file", "folder"), file("file", "mine")),
    Case("out-name-too-long", f"{CONVERT} -o {{tmp}}/{300 * 'a'}", ("{tmp}/aaaa",)),
    Case("plan-out-below-nothing", f"{PLAN} -o {{tmp}}/nowhere/plan.yaml", ("--output", "{tmp}/nowhere/plan.yaml")),
    Case("plan-out-is-a-folder", f"{PLAN} -o {{model}}", ("--output", "{model}")),
]

EVALS = [
    Case("eval-text-missing", f"{EVAL} {{tmp}}/text.txt", ("{tmp}/text.txt",)),
    Case("eval-text-tiny", f"{EVAL} {{tmp}}/text", ("{tmp}/text", "256"), text("Once upon a time.")),
    Case("eval-tokens-few", f"{EVAL} {{valid}} --tokens 10", ("--tokens", "256")),
    Case("eval-tokens-0", f"{EVAL} {{valid}} --tokens 0", ("--tokens",)),
    Case("eval-length-short", f"{EVAL} {{valid}} --length 2", ("--length",)),
    Case("eval-context-0", f"{EVAL} {{valid}}", ("max_position_embeddings", "0"), config(max_position_embeddings=0)),
    Case("eval-rope-unknown", f"{EVAL} {{valid}}", ("{model}", "spiral"), config(rope_parameters=SPIRAL)),
    Case("eval-against-missing", f"{EVAL} {{valid}} --against {{tmp}}/nowhere", ("{tmp}/nowhere",)),
    Case(
        "eval-against-other-vocabulary",
        f"{EVAL} {{valid}} --against {{tmp}}/larger/model",
        ("{tmp}/larger/model", "512", "520", "--against"),
        larger_vocabulary,
    ),
]

GENERATES = [
    Case("prompt-without-tokens", f"{GENERATE} Once", ("--prompt", "'Once'", "no tokens"), silent_tokenizer),
    Case("prompt-empty", f"{GENERATE} {{empty}}", ("--prompt", "no tokens"), silent_tokenizer),
    Case("prompt-not-utf8", f"{GENERATE} \udcff", ("--prompt", "UTF-8")),
    Case("generate-size-text", f"{GENERATE} Once", ("{model}", "hidden_size", "64"), config(hidden_size="64")),
    Case("temperature-negative", f"{GENERATE} Once --temperature -1", ("--temperature", "0")),
    Case("no-new-tokens", f"{GENERATE} Once --max-new-tokens 0", ("--max-new-tokens", "1")),
    Case("generate-seed-large", f"{GENERATE} Once --temperature 1 --seed {2**65}", ("--seed",)),
]

USAGE = [
    Case("command-unknown", "transmogrify", ("transmogrify",)),
    Case("option-unknown", f"{PLAN} --kv-cash 0.5", ("--kv-cash",)),
    Case("inspect-nothing", "inspect", ("model",)),
    Case("plan-nothing", "plan", ("model",)),
    Case("plan-of-codes", f"{PLAN} --codec kvquant -o {{tmp}}/plan.yaml", ("plan.yaml", "add --codec none")),
    Case("convert-nothing", "convert", ("model",)),
    Case("convert-nowhere", "convert {model}", ("--output",)),
    Case("eval-no-text", "eval {model}", ("--text",)),
    Case("generate-no-prompt", "generate {model}", ("--prompt",)),
    Case("argument-too-many", "inspect {model} {model}", ("{model}",)),
    Case("option-without-value", f"{PLAN} --kv-cache", ("--kv-cache",)),
]

CASES = (
    MODEL_PLACES
    + CONFIG_FILES
    + on_each({"plan": PLAN, "convert": CONVERT}, REFUSED_CONFIGS)
    + on_each({"plan": PLAN}, SIZES + FAMILY_CONFIGS)
    + WEIGHTS
    + SETTINGS
    + TEXTS
    + OUTPUTS
    + RECIPES
    + PLANS
    + EVALS
    + GENERATES
    + USAGE
)

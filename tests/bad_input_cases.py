"""What can be wrong with anymla's input: how each damage is done, the command to run, what the message must name.

Each case starts from a fresh folder {tmp} with an undamaged copy of the bundled model at {model}.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

os.environ.pop("FORCE_COLOR", None)  # would make rich, once imported, write to pipes as to a terminal

import anymla
from anymla import cli

DATA = Path(anymla.__file__).parent / "data"
BUNDLED, TRAIN, VALID = DATA / "stories260K", DATA / "tinystories-train.txt", DATA / "tinystories-valid.txt"
PLACES = {"model": "{tmp}/model", "out": "{tmp}/out", "train": str(TRAIN), "valid": str(VALID), "empty": ""}
REMOVED = object()
Damage = Callable[[Path], None]

FAST = "--calibration-tokens 2048 --calibration-length 64"
INSPECT, PLAN = "inspect {model}", "plan {model}"
CONVERT = f"convert {{model}} -o {{out}} {FAST} --calibration {{train}}"
ON_TEXT = f"convert {{model}} -o {{out}} {FAST} --calibration {{tmp}}/text"
ON_PLAN = "convert {model} -o {out} --plan {tmp}/plan.yaml"
ON_RECIPE = "convert {model} -o {out} --recipe {tmp}/recipe.yaml"
EVAL = "eval {model} --tokens 512 --length 64 --text"
GENERATE = "generate {model} --max-new-tokens 2 --prompt"


@dataclass(frozen=True)
class Run:
    """What a command gave back."""

    code: int
    out: str
    err: str


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, through the console script's entry point."""
    monkeypatch.setattr(sys, "argv", ["anymla", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    streams = capfd.readouterr()
    return Run(int(stop.value.code or 0), streams.out, streams.err)


@dataclass(frozen=True)
class Case:
    """``words`` must stand in the message; _ and - count as the same: kv_cache in a file is --kv-cache here."""

    id: str
    arguments: str
    words: tuple[str, ...]
    damage: Damage | None = None

    def prepare(self, tmp: Path) -> list[str]:
        """Lays out {tmp}, damages it, and returns the command's arguments."""
        copy_model(tmp / "model")
        if self.damage is not None:
            self.damage(tmp)
        return [filled(part, tmp) for part in self.arguments.split()]

    def missing_words(self, tmp: Path, message: str) -> list[str]:
        """The words that ``message`` should hold and does not; the digits in {tmp}'s own name count for nothing."""
        message = message.replace(str(tmp), "{tmp}").replace("_", "-")
        wanted = {word: filled(word, tmp).replace(str(tmp), "{tmp}").replace("_", "-") for word in self.words}
        return [word for word, text in wanted.items() if text not in message]


def filled(text: str, tmp: Path) -> str:
    """``text`` with the names in braces replaced by what they stand for."""
    for name, value in PLACES.items():
        text = text.replace(f"{{{name}}}", value)
    return text.replace("{tmp}", str(tmp))


def copy_model(target: Path) -> Path:
    """An undamaged copy of the bundled model."""
    return Path(shutil.copytree(BUNDLED, target))


def file(name: str, content: bytes | str) -> Damage:
    """Writes a file below {tmp}."""

    def damage(tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def folder(name: str) -> Damage:
    return lambda tmp: (tmp / name).mkdir(parents=True)


def link(name: str, target: str) -> Damage:
    return lambda tmp: (tmp / name).symlink_to(tmp / target)


def remove(name: str) -> Damage:
    return lambda tmp: (tmp / name).unlink()


def all_of(*damages: Damage) -> Damage:
    def damage(tmp: Path) -> None:
        for one in damages:
            one(tmp)

    return damage


def config(**changes: Any) -> Damage:
    """Sets fields of config.json, or removes them."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not REMOVED}))

    return damage


def truncated(keep: int, name: str = "model.safetensors") -> Damage:
    """Keeps the first bytes of the weights only."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / name
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Lets ``edit`` change the tensors, which it is given by name."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / "model.safetensors"
        state = load_file(path)
        edit(state)
        save_file(state, path, metadata={"format": "pt"})

    return damage


def number(name: str, value: float) -> Damage:
    """Puts one number into a tensor."""
    return tensors(lambda state: state[name].view(-1)[3:4].fill_(value))


def row_less(name: str) -> Damage:
    """Takes the last row off a tensor."""
    return tensors(lambda state: state.update({name: state[name][:-1].clone()}))


def index(content: str) -> Damage:
    """Makes model.safetensors the shard a.safetensors under an index."""

    def damage(tmp: Path) -> None:
        (tmp / "model" / "model.safetensors").rename(tmp / "model" / "a.safetensors")
        (tmp / "model" / "model.safetensors.index.json").write_text(content)

    return damage


def shards(**weight_map: Any) -> Damage:
    return index(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single_file_and_index(tmp: Path) -> None:
    """A whole shard under an index, and a broken single file, which is the one that transformers prefers."""
    shards(x="a.safetensors")(tmp)
    (tmp / "model" / "model.safetensors").write_bytes(b"broken")


class _Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def only_pickled(tmp: Path) -> None:
    """Pickled weights that leave a trace when they are loaded, and no others."""
    (tmp / "model" / "model.safetensors").unlink()
    (tmp / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp / "loaded")))


def silent_tokenizer(tmp: Path) -> None:
    """A tokenizer that knows no character and drops what it does not know."""
    path = tmp / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["model"] |= {"vocab": special, "merges": [], "unk_token": None, "byte_fallback": False}
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer))


def eager_tokenizer(tmp: Path) -> None:
    """A tokenizer with a token, of a frequent word, that the model does not have."""
    path = tmp / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"content": "the", "id": 512, "special": False})
    path.write_text(json.dumps(tokenizer))


def larger_vocabulary(tmp: Path) -> None:
    """A whole model at {tmp}/larger/model that has eight more tokens."""
    copy_model(tmp / "larger" / "model")
    name = "model.embed_tokens.weight"
    config(vocab_size=520)(tmp / "larger")
    tensors(lambda state: state.update({name: torch.cat([state[name], state[name][:8]])}))(tmp / "larger")


def plan(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """A plan of the bundled model, edited by hand, at {tmp}/plan.yaml."""

    def damage(tmp: Path) -> None:
        settings = {"calibration": str(TRAIN), "calibration_tokens": 2048, "calibration_length": 64}
        planned = anymla.plan(tmp / "model", **settings).model_dump(mode="json")
        edit(planned)
        (tmp / "plan.yaml").write_text(yaml.safe_dump(planned))

    return damage


def planned_layer(**changes: Any) -> Damage:
    """A plan in which layer 2 is changed."""
    return plan(lambda planned: planned["layers"][2].update(changes))


def recipe(content: bytes | str) -> Damage:
    return file("recipe.yaml", content)


def text(content: bytes | str, name: str = "text") -> Damage:
    return file(name, content)


def on_each(commands: dict[str, str], cases: list[Case]) -> list[Case]:
    """Every case once per command."""
    return [
        replace(case, id=f"{case.id}-{name}", arguments=command) for case in cases for name, command in commands.items()
    ]


V_PROJ, UP_PROJ = "model.layers.3.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"
MODEL_FILE, CONFIG_FILE, INDEX_FILE = "model.safetensors", "config.json", "model.safetensors.index.json"
SHARD = "{model}/a.safetensors"
ROW = '{"text": "Once upon a time there was a cat."}\n'

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

CONFIG_FILES = on_each(
    {"inspect": INSPECT, "plan": PLAN, "convert": CONVERT},
    [
        Case("config-missing", "", ("{model}", "no config.json"), remove("model/config.json")),
        Case("config-not-json", "", ("{model}/config.json", "JSON"), file("model/config.json", "{model_type: llama}")),
        Case("config-empty", "", ("{model}/config.json", "JSON"), file("model/config.json", "")),
        Case("config-no-object", "", ("{model}/config.json", "no JSON object"), file("model/config.json", "[1, 2]")),
        Case("config-not-utf8", "", ("{model}/config.json",), file("model/config.json", b'{"model_type": "\xff"}')),
        Case("config-nested", "", ("{model}/config.json",), file("model/config.json", 100_000 * "[")),
        Case("config-digits", "", ("{model}/config.json",), file("model/config.json", f'{{"a": {5000 * "9"}}}')),
    ],
)

SPIRAL = {"rope_type": "spiral", "rope_theta": 10000.0}
REFUSED_CONFIGS = [
    Case("family-unknown", "", ("'gpt2'", "not supported", "llama"), config(model_type="gpt2")),
    Case("family-missing", "", ("model_type",), config(model_type=REMOVED)),
    Case("family-not-text", "", ("model_type",), config(model_type=["llama"])),
    Case("encoder-decoder", "", ("'t5'", "encoder-decoder"), config(model_type="t5", is_encoder_decoder=True)),
    Case("mla-deepseek", "", ("already", "kv_lora_rank 512"), config(model_type="deepseek_v3", kv_lora_rank=512)),
    Case("mla-anymla", "", ("already", "anymla"), config(model_type="anymla_llama", kv_lora_rank=12)),
    Case("quantised", "", ("quantised", "gptq"), config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Case("size-negative", "", (CONFIG_FILE, "hidden_size", "-64"), config(hidden_size=-64)),
    Case("size-zero", "", (CONFIG_FILE, "num_hidden_layers", "0"), config(num_hidden_layers=0)),
    Case("size-text", "", (CONFIG_FILE, "num_attention_heads", "'8'"), config(num_attention_heads="8")),
    Case("size-fraction", "", (CONFIG_FILE, "intermediate_size", "172.5"), config(intermediate_size=172.5)),
    Case("size-missing", "", (CONFIG_FILE, "hidden_size"), config(hidden_size=REMOVED)),
    Case("size-bool", "", (CONFIG_FILE, "vocab_size", "True"), config(vocab_size=True)),
    Case("kv-heads-zero", "", (CONFIG_FILE, "num_key_value_heads", "0"), config(num_key_value_heads=0)),
    Case("heads-not-divisible", "", ("num_attention_heads 8", "num_key_value_heads 3"), config(num_key_value_heads=3)),
    Case("head-dim-odd", "", ("head_dim 7",), config(head_dim=7)),
    Case("head-dim-odd-derived", "", ("head_dim 5",), config(head_dim=REMOVED, hidden_size=40)),
    Case("context-negative", "", (CONFIG_FILE, "max_position_embeddings"), config(max_position_embeddings=-1)),
    Case("dtype-unknown", "", (CONFIG_FILE, "dtype", "int8"), config(dtype="int8")),
    Case("rope-unknown", "", ("rope type", "'spiral'", "yarn"), config(rope_parameters=SPIRAL)),
    Case("rope-no-object", "", (CONFIG_FILE, "rope", "'linear'"), config(rope_parameters="linear")),
    Case("rope-theta-text", "", ("rope_theta", "'big'"), config(rope_parameters={"rope_theta": "big"})),
    Case("rope-theta-zero", "", ("rope_theta", "0"), config(rope_parameters={"rope_theta": 0})),
    Case("rope-theta-nan", "", ("rope_theta", "nan"), config(rope_parameters={"rope_theta": float("nan")})),
    Case("rope-factor-zero", "", ("rope", "factor", "0"), config(rope_parameters={"rope_type": "linear", "factor": 0})),
    Case("rope-theta-inf", "", ("rope_theta", "inf"), config(rope_parameters={"rope_theta": float("inf")})),
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
]

IMPOSSIBLE_BUDGETS = [
    "--kv-cache 0.01",
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

RECIPE_FILE, PLAN_FILE = "{tmp}/recipe.yaml", "{tmp}/plan.yaml"
RECIPES = [
    Case("recipe-missing", ON_RECIPE, (RECIPE_FILE,)),
    Case("recipe-is-a-folder", ON_RECIPE, (RECIPE_FILE,), folder("recipe.yaml")),
    Case("recipe-not-utf8", ON_RECIPE, (RECIPE_FILE,), recipe(b"device: \xff")),
    Case("recipe-broken-yaml", ON_RECIPE, (RECIPE_FILE, "line 2"), recipe("kv_cache: 0.5\nrope: [high")),
    Case("recipe-nested", ON_RECIPE, (RECIPE_FILE,), recipe("rope: " + 5000 * "[")),
    Case("recipe-a-list", ON_RECIPE, (RECIPE_FILE, "names and values"), recipe("- kv_cache\n- 0.5\n")),
    Case("recipe-empty", ON_RECIPE, (RECIPE_FILE, "names and values"), recipe("")),
    Case("recipe-unknown-key", ON_RECIPE, (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
    Case("recipe-unknown-number", ON_RECIPE, (RECIPE_FILE, "7"), recipe("7: 0.5")),
    Case("recipe-wrong-kind", ON_RECIPE, (RECIPE_FILE, "kv_cache", "'half'"), recipe("kv_cache: half")),
    Case("recipe-wrong-kind-list", ON_RECIPE, (RECIPE_FILE, "seed", "[1]"), recipe("seed: [1]")),
    Case("recipe-wrong-choice", ON_RECIPE, (RECIPE_FILE, "rope", "'spiral'"), recipe("rope: spiral")),
    Case("recipe-out-of-range", ON_RECIPE, (RECIPE_FILE, "kv_cache", "nan"), recipe("kv_cache: .nan")),
    Case("recipe-beside-options", f"{ON_RECIPE} --seed 1", (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
    Case("recipe-plan", f"{PLAN} --recipe {RECIPE_FILE}", (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
]

PLANS = [
    Case("plan-missing", ON_PLAN, (PLAN_FILE,)),
    Case("plan-is-a-recipe", ON_PLAN, (PLAN_FILE,), file("plan.yaml", "kv_cache: 0.5")),
    Case("plan-broken-yaml", ON_PLAN, (PLAN_FILE,), file("plan.yaml", "layers: [")),
    Case("plan-a-list", ON_PLAN, (PLAN_FILE, "names and values"), file("plan.yaml", "[1]")),
    Case("plan-of-fewer-layers", ON_PLAN, ("4 layers", "5"), plan(lambda planned: planned["layers"].pop())),
    Case(
        "plan-bad-recipe", ON_PLAN, (PLAN_FILE, "kv_cache"), plan(lambda planned: planned["recipe"].update(kv_cache=2))
    ),
    Case("plan-size-word", ON_PLAN, (PLAN_FILE, "layers.2.kv_rank"), planned_layer(kv_rank="twelve")),
    Case("plan-rank-negative", ON_PLAN, (PLAN_FILE, "layers.2"), planned_layer(kv_rank=-12, rope_dims=28)),
    Case("plan-rope-dims-odd", ON_PLAN, ("layer", "2", "rope_dims"), planned_layer(kv_rank=13, rope_dims=3)),
    Case(
        "plan-rope-dims-large", ON_PLAN, ("layer", "2", "34"), planned_layer(kv_rank=2, rope_dims=34, cached_numbers=36)
    ),
    Case("plan-rank-large", ON_PLAN, ("layer", "2", "65"), planned_layer(kv_rank=65, rope_dims=4, cached_numbers=69)),
    Case("plan-without-choices", ON_PLAN, (PLAN_FILE, "layers.2"), planned_layer(rope_choices=[])),
    Case("plan-with-a-recipe", f"{ON_PLAN} --recipe {RECIPE_FILE}", ("--plan",), recipe("seed: 1")),
    Case("plan-with-an-option", f"{ON_PLAN} --kv-cache 0.5", ("--plan",), plan(lambda planned: None)),
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

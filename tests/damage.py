"""How input is damaged, and what a case of bad input is: the damage, the command to run, what the message must name.

Each case starts from a fresh folder {tmp} with an undamaged copy of the bundled model at {model}.
"""

import copy
import functools
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
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
from tests.family_models import tiny_config, tiny_model

DATA = Path(anymla.__file__).parent / "assets"
BUNDLED, TRAIN, VALID = DATA / "stories260K", DATA / "tinystories-train.txt", DATA / "tinystories-valid.txt"
PLACES = {"model": "{tmp}/model", "out": "{tmp}/out", "train": str(TRAIN), "valid": str(VALID), "empty": ""}
REMOVED = object()
Damage = Callable[[Path], None]

FAST = "--calibration-tokens 2048 --calibration-length 64 --reconstruction-steps 2"
INSPECT, PLAN = "inspect {model}", "plan {model}"
CONVERT = f"convert {{model}} -o {{out}} {FAST} --calibration {{train}}"
ON_TEXT = f"convert {{model}} -o {{out}} {FAST} --calibration {{tmp}}/text"
ON_PLAN = "convert {model} -o {out} --plan {tmp}/plan.yaml"
ON_RECIPE = "convert {model} -o {out} --recipe {tmp}/recipe.yaml"
EVAL = "eval {model} --tokens 512 --length 64 --text"
PROGRESS = re.compile(
    r"(chat|compare|convert|demo|eval|export|generate|push|run|tune): .*\d s( so far)?(, about \d+ s left)?$"
)
GENERATE = "generate {model} --max-new-tokens 2 --prompt"


@dataclass(frozen=True)
class Run:
    """What a command gave back; ``err`` is without the lines that say how far it was, which are in ``progress``."""

    code: int
    out: str
    err: str
    progress: tuple[str, ...] = ()

    @classmethod
    def of(cls, code: int, out: str, err: str) -> "Run":
        lines = err.splitlines(keepends=True)
        progress = [line for line in lines if PROGRESS.match(line)]
        return cls(code, out, "".join(line for line in lines if line not in progress), tuple(progress))


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, through the console script's entry point."""
    monkeypatch.setattr(sys, "argv", ["anymla", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    streams = capfd.readouterr()
    return Run.of(int(stop.value.code or 0), streams.out, streams.err)


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


def copy_model(target: Path, source: Path = BUNDLED) -> Path:
    """An undamaged copy of the bundled model."""
    return Path(shutil.copytree(source, target))


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


def in_text(old: str, new: str) -> Damage:
    """Replaces text of config.json, for what json.dumps does not write."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


def sparse(name: str, size: int) -> Damage:
    """A file of zeros that takes no room on the disk."""

    def damage(tmp: Path) -> None:
        with (tmp / name).open("wb") as file:
            file.truncate(size)

    return damage


def shaped(family: str, **changes: Any) -> Damage:
    """Gives the model the config of a tiny model of another family, changed: enough to plan on."""

    def damage(tmp: Path) -> None:
        fields = tiny_config(family).to_dict() | {"dtype": "float32"}
        (tmp / "model" / "config.json").write_text(json.dumps(fields))
        config(**changes)(tmp)

    return damage


@functools.cache
def tiny_state(family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a tiny model, as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(family, torch.float32).save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


def tiny(family: str, edit: Callable[[dict[str, torch.Tensor]], Any] | None = None, **changes: Any) -> Damage:
    """Replaces the model by a whole tiny one of another family, with tensors and config changed."""

    def damage(tmp: Path) -> None:
        fields, state = copy.deepcopy(tiny_state(family))
        (tmp / "model" / "generation_config.json").unlink()
        (tmp / "model" / "config.json").write_text(json.dumps(fields))
        if edit is not None:
            edit(state)
        save_file(state, tmp / "model" / "model.safetensors", metadata={"format": "pt"})
        config(**changes)(tmp)

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


def header(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Lets ``edit`` change the header of the weights, the numbers left as they are; text replaces the header."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / "model.safetensors"
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        fields = json.loads(content[8:length])
        result = edit(fields)
        text = (result if isinstance(result, str) else json.dumps(fields)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[length:])

    return damage


def flipped(bit: int, name: str = "model.safetensors") -> Damage:
    """Flips one bit of a file of the model; negative ones count from the end."""

    def damage(tmp: Path) -> None:
        path = tmp / "model" / name
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    return damage


def two_shards(**weight_map: Any) -> Damage:
    """The weights twice, as a.safetensors and b.safetensors, under an index."""

    def damage(tmp: Path) -> None:
        shards(**weight_map)(tmp)
        shutil.copyfile(tmp / "model" / "a.safetensors", tmp / "model" / "b.safetensors")

    return damage


def appended(content: bytes, name: str = "model.safetensors") -> Damage:
    def damage(tmp: Path) -> None:
        with (tmp / "model" / name).open("ab") as file:
            file.write(content)

    return damage


def below(name: str, damage: Damage) -> Damage:
    """Does the damage to the model at {tmp}/name/model."""
    return lambda tmp: damage(tmp / name)


def number(name: str, value: float) -> Damage:
    """Puts one number into a tensor."""
    return tensors(lambda state: state[name].view(-1)[3:4].fill_(value))


def row_less(name: str) -> Damage:
    """Takes the last row off a tensor."""
    return tensors(lambda state: state.update({name: state[name][:-1].clone()}))


def index(content: bytes | str) -> Damage:
    """Makes model.safetensors the shard a.safetensors under an index."""

    def damage(tmp: Path) -> None:
        (tmp / "model" / "model.safetensors").rename(tmp / "model" / "a.safetensors")
        file("model/model.safetensors.index.json", content)(tmp)

    return damage


def shards(**weight_map: Any) -> Damage:
    return index(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single_file_and_index(tmp: Path) -> None:
    """A whole shard under an index, and a broken single file, which is the one that transformers prefers."""
    shards(x="a.safetensors")(tmp)
    (tmp / "model" / "model.safetensors").write_bytes(b"broken")


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def only_pickled(tmp: Path) -> None:
    """Pickled weights that leave a trace when they are loaded, and no others."""
    (tmp / "model" / "model.safetensors").unlink()
    (tmp / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp / "loaded")))


def pickled_shard(tmp: Path) -> None:
    """An index that names a pickle which leaves a trace when it is loaded."""
    shards(x="b.bin")(tmp)
    (tmp / "model" / "b.bin").write_bytes(pickle.dumps(Trap(tmp / "loaded")))


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


NORM = "model.norm.weight"
V_PROJ, UP_PROJ = "model.layers.3.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"
MODEL_FILE, CONFIG_FILE, INDEX_FILE = "model.safetensors", "config.json", "model.safetensors.index.json"
SHARD = "{model}/a.safetensors"
ROW = '{"text": "Once upon a time there was a cat."}\n'

"""What every format of anymla export has, and that a folder is all that a new one takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import anymla
from anymla import exports
from anymla.errors import RecipeError
from anymla.exports import format as formats
from anymla.exports.format import all_formats
from anymla.layouts import LAYOUTS, TARGETS, listed
from anymla.methods.mla.settings import MLA

SOURCE = Path(anymla.__file__).parent
TOY = """
import shutil
from anymla.exports.format import Format

class ToyFormat(Format):
    name = "toy"
    kind = "a copy"
    dtypes = ("float32",)
    pads = ()
    library = "toybox"

    def write(self, converted, folder, *, dtype, pad, cache):
        from anymla.exports.parity import check_parity

        for name in ("config.json", "model.safetensors", "conversion.json"):
            shutil.copyfile(converted / name, folder / name)
        return check_parity(converted, folder)

    def commands(self, folder, place, *, dtype, pad, cache):
        return {"toy": f"play {place} {dtype}"}
"""


def test_every_layout_has_a_format_and_every_format_a_layout():
    assert list(all_formats()) == list(TARGETS) == list(LAYOUTS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_format_is_whole(name):
    chosen = all_formats()[name]
    assert chosen.layout.name == chosen.name == name
    assert chosen.layout.engines
    assert chosen.kind and chosen.dtypes
    assert chosen.default_pad in (*chosen.pads, "none")
    assert all(chosen.dtype_of(dtype) in (*chosen.dtypes, None) for dtype in ("float32", "bfloat16", "float16"))
    assert type(chosen).__module__ == f"anymla.exports.{name}.format"
    assert MLA(target=name).target == name


def test_targets_are_those_of_the_layouts():
    with pytest.raises(RecipeError, match="target"):
        MLA.of({"target": "toy"})


def test_nothing_asks_for_a_format_by_name():
    """Outside of its folder and of the layouts."""
    names = "|".join(TARGETS)
    asks = re.compile(rf"""(==|!=) ["'](?:{names})["']|\bin [(\[{{]["'](?:{names})["']|["'](?:{names})["']: """)
    for file in SOURCE.rglob("*.py"):
        place = file.relative_to(SOURCE)
        if place.parts[0] in ("modeling", "layouts.py") or place.parts[:2] in {("exports", name) for name in TARGETS}:
            continue
        assert not asks.search(file.read_text()), place


def test_formats_load_without_torch():
    code = "import sys; from anymla.exports.format import all_formats; all_formats(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_is_a_format(stories, tmp_path, monkeypatch):
    """With its text in the card, its command and its checks; the layout is all else that it needs."""
    (folder := tmp_path / "more" / "toy").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "format.py").write_text(TOY)
    monkeypatch.setattr(exports, "__path__", [*exports.__path__, str(folder.parent)])
    with pytest.raises(ValueError, match="not in tuple"):
        all_formats()
    monkeypatch.setattr(formats, "TARGETS", (*TARGETS, "toy"))
    monkeypatch.setitem(LAYOUTS, "toy", LAYOUTS["vllm"])
    done = anymla.export(stories.converted, tmp_path / "out", "toy")
    assert (done.target, done.dtype, done.commands) == ("toy", "float32", {"toy": f"play {tmp_path / 'out'} float32"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This is a copy, exported with" in card and "library_name: toybox" in card
    assert "\nplay THIS_FOLDER float32\n" in card and "--to toy -o out --dtype float32\n" in card
    with pytest.raises(RecipeError, match="--pad"):
        anymla.export(stories.converted, tmp_path / "other", "toy", pad="cpu")


def test_listed():
    assert [listed(names, "or") for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]

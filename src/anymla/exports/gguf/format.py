"""gguf: one file of llama.cpp, made of the deepseek export."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from anymla.errors import UnsupportedModelError
from anymla.exports.format import Format
from anymla.exports.gguf.writer import GgufDtype, require_gguf, write_gguf
from anymla.io.config import read_object

if TYPE_CHECKING:
    from anymla.exports.parity import Parity

FILE = "model.gguf"
OWN = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f32"}  # GGUF's names
# On CPUs with AMX the llama.cpp of llama-cpp-python 0.3.36 ends with GGML_ASSERT on such files (run_llama_cpp.py).
PACKED = ("f16", "q8_0")
GGML_TYPES = {"q8_0": 8, "q4_0": 2}  # as llama_cpp.server wants them
NOT_RUN = "llama.cpp was not run (llama-cpp-python is not installed): the weights are those read back from the file"
RECORDS = ("conversion.json", "recipe.yaml", "plan.yaml", "tuning.json", "tuning.yaml")


class GgufFormat(Format):
    """For llama.cpp."""

    name = "gguf"
    kind = "a GGUF file of llama.cpp's arch `deepseek2`, tokenizer and chat template included"
    dtypes = get_args(GgufDtype)
    pads = ()
    library = "gguf"
    place = "."

    def dtype_of(self, own: str) -> str | None:
        """Every dtype has its own here; float64 becomes f32."""
        return OWN.get(own)

    def check_source(self, model: str, folder: Path, vocab_size: int) -> None:
        """llama.cpp must have the tokenizer."""
        from anymla.exports.gguf.tokenizer import known_tokenizer
        from anymla.io.checkpoint import load_tokenizer

        try:
            known_tokenizer(load_tokenizer(folder), vocab_size)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"--target {self.name} cannot hold the tokenizer of {model}: {error}; --target deepseek leaves it as "
                "it is"
            ) from error

    def write(self, converted: Path, folder: Path, *, dtype: str, pad: str, cache: str | None) -> Parity:
        """By way of a DeepSeek checkpoint in float32, so that weights are rounded once."""
        from anymla.exports.deepseek.writer import write_deepseek
        from anymla.exports.gauge_choice import chosen_gauges

        require_gguf()
        kind = cast("GgufDtype", dtype)
        (deepseek := folder / "deepseek").mkdir()
        gauges = partial(chosen_gauges, block=self.layout.shapes.block(cache)) if cache else None
        write_deepseek(converted, deepseek, pad="blocks" if cache else "none", dtype="float32", gauges=gauges)
        write_gguf(deepseek, folder / FILE, dtype=kind)
        parity = _checked(converted, deepseek, folder / FILE, kind, cache)
        for name in RECORDS:
            if (deepseek / name).is_file():
                (deepseek / name).rename(folder / name)
        shutil.rmtree(deepseek)
        return parity

    def commands(self, folder: Path, place: Path | str, *, dtype: str, pad: str, cache: str | None) -> dict[str, str]:
        """Per program of llama.cpp."""
        file = f"{shlex.quote(str(place))}/{FILE}"
        options, python = " --no-repack" if dtype in PACKED else "", ""
        if cache is not None:
            options += f" --flash-attn on --cache-type-k {cache} --cache-type-v {cache}"
            python = f" --flash_attn true --type_k {GGML_TYPES[cache]} --type_v {GGML_TYPES[cache]}"
        return {
            "llama.cpp": f"llama-server -m {file}{options}",
            "terminal": f"llama-cli -m {file}{options}",
            "Python": f"python -m llama_cpp.server --model {file}{python}",
        }


def _checked(converted: Path, deepseek: Path, file: Path, dtype: GgufDtype, cache: str | None) -> Parity:
    """In llama.cpp, or by the weights read back where that is not installed."""
    from anymla.exports.gguf.llama_cpp import check_in_llama, llama_loss, llama_python
    from anymla.exports.gguf.read_back import check_file
    from anymla.exports.parity import planned_numbers

    if (python := llama_python()) is None:
        return replace(check_file(converted, deepseek, file, dtype=dtype), not_run=NOT_RUN)
    layers = int(read_object(deepseek / "config.json")["num_hidden_layers"])
    found = check_in_llama(python, converted, file, dtype=dtype, layers=layers, cached=planned_numbers(deepseek))
    return replace(found, cache_loss=llama_loss(python, converted, file, cache) if cache else None)

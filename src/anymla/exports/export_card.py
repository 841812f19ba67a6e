"""The model card of an export: that of the converted model, with how to use this one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.cards import FILES, FOLDER, USE, public_name, static_norms_cost, with_section
from anymla.io.config import read_object

if TYPE_CHECKING:
    from anymla.exports.export import Export

KINDS = {
    "deepseek": "a stock, dense `DeepseekV3ForCausalLM` checkpoint, which needs nothing of anymla",
    "vllm": "a checkpoint with remote code that vLLM's transformers backend serves with latent attention",
    "gguf": "a GGUF file of llama.cpp's arch `deepseek2`, tokenizer and chat template included",
}
CLASSES = {"deepseek": "", "vllm": ", trust_remote_code=True"}


def export_card(converted: Path, done: Export, commands: Iterable[str]) -> str:
    """README.md of an export; ``commands`` serve it from the place that stands for it in cards."""
    card = f"# {done.output.name}\n"
    with suppress(OSError, UnicodeDecodeError):
        card = (converted / "README.md").read_text(encoding="utf-8")
    card = re.sub(rf"\n## {FILES}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)  # those of the converted model
    if done.target == "gguf":
        card = card.replace("library_name: transformers", "library_name: gguf", 1)
    card = with_section(card, USE, _use(done.target, commands))
    return with_section(card, "Export", f"{_made(converted, done)}\n\n{_found(done)}{_lost(converted)}")


def _made(converted: Path, done: Export) -> str:
    """What it is and the command that makes it again."""
    words = ["anymla", "export", public_name(converted.resolve()), "--to", done.target, "-o", done.output.name]
    words += ["--dtype", done.dtype] + ([] if done.target == "gguf" else ["--pad", done.pad])
    versions = ", ".join(f"{name} {version}" for name, version in done.versions.items())
    return f"""This is {KINDS[done.target]}, exported with {versions}:

```sh
{shlex.join(words)}
```"""


def _found(done: Export) -> str:
    """How near it is to the converted model, and what ran it."""
    found = done.parity
    why = f" {found.engine_failed or found.not_run}." if found.engine_failed or found.not_run else ""
    return (
        f"Compared with the converted model in {found.engine}: {found.summary}.{why} All figures are in `export.json`."
    )


def _lost(converted: Path) -> str:
    """What fixed scales in place of norms on queries and keys cost, where the conversion put them there."""
    path = converted / "conversion.json"
    layers = read_object(path).get("layers") if path.is_file() else None
    lost = [each for layer in layers or () if isinstance(layer, Mapping) and (each := layer.get("norms_lost"))]
    if not lost:
        return ""
    return (
        "\n\nNorms on queries and keys were replaced by fixed scales (`--static-qk-norm`), which changes the model: "
        f"{static_norms_cost(lost)} (`norms_lost` in `conversion.json`)."
    )


def _use(target: str, commands: Iterable[str]) -> str:
    shell = "```sh\n" + "\n".join(commands) + "\n```\n"
    if target not in CLASSES:
        return shell
    return f"""{shell}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{FOLDER}"{CLASSES[target]})
```
"""

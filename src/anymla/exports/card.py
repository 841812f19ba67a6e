"""The model card of an export: that of the converted model, with how to use this one."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.conversion.card import FILES, FOLDER, USE, with_section

if TYPE_CHECKING:
    from anymla.exports.export import Export

KINDS = {
    "deepseek": "a stock, dense `DeepseekV3ForCausalLM` checkpoint, which needs nothing of anymla",
    "vllm": "a checkpoint with remote code that vLLM's transformers backend serves with latent attention",
    "gguf": "a GGUF file of llama.cpp's arch `deepseek2`, tokenizer and chat template included",
}
CLASSES = {"deepseek": "", "vllm": ", trust_remote_code=True"}


def export_card(converted: Path, done: Export) -> str:
    """README.md of an export."""
    card = f"# {done.output.name}\n"
    with suppress(OSError, UnicodeDecodeError):
        card = (converted / "README.md").read_text(encoding="utf-8")
    card = re.sub(rf"\n## {FILES}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)  # those of the converted model
    if done.target == "gguf":
        card = card.replace("library_name: transformers", "library_name: gguf", 1)
    found = done.parity
    check = (
        f"This is {KINDS[done.target]}, exported by anymla {done.anymla_version}. Compared with the converted model in "
        f"{found.engine}: {found.compared} within {found.difference:.2g} of the logits' standard deviation "
        f"({found.tolerance:g} allowed), "
        f"{found.tokens} of {found.of} greedy tokens equal, {found.cached_numbers:g} numbers per token and layer in "
        "the cache. All figures are in `export.json`."
    )
    return with_section(with_section(card, USE, _use(done)), "Export", check)


def _use(done: Export) -> str:
    quoted = shlex.quote(str(done.output))
    place = "" if done.target == "gguf" else FOLDER
    lines = [command.replace(f"{quoted}/", place).replace(quoted, place) for command in done.commands.values()]
    shell = "```sh\n" + "\n".join(lines) + "\n```\n"
    if done.target not in CLASSES:
        return shell
    return f"""{shell}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{FOLDER}"{CLASSES[done.target]})
```
"""

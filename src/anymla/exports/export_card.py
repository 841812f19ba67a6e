"""The model card of an export: that of the converted model, with how to use this one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from anymla.cards import (
    FILES,
    LIBRARY,
    USE,
    loading,
    public_name,
    shell,
    static_norms_cost,
    versions_named,
    with_section,
)
from anymla.exports.export_report import Export
from anymla.exports.format import Format
from anymla.io.config import read_object


def export_card(converted: Path, chosen: Format, done: Export, commands: Iterable[str]) -> str:
    """README.md of an export; ``commands`` serve it from the place that stands for it in cards."""
    card = f"# {done.output.name}\n"
    with suppress(OSError, UnicodeDecodeError):
        card = (converted / "README.md").read_text(encoding="utf-8")
    card = re.sub(rf"\n## {FILES}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)  # those of the converted model
    card = card.replace(LIBRARY, f"library_name: {chosen.library}", 1)
    card = with_section(card, USE, _use(chosen, commands))
    return with_section(card, "Export", f"{_made(converted, chosen, done)}\n\n{_found(done)}{_lost(converted)}")


def _made(converted: Path, chosen: Format, done: Export) -> str:
    """What it is and the command that makes it again."""
    words = ["anymla", "export", public_name(converted.resolve()), "--to", done.target, "-o", done.output.name]
    words += ["--dtype", done.dtype] + (["--pad", done.pad] if chosen.pads else [])
    words += [] if done.cache_type is None else ["--cache-type", done.cache_type]
    return f"This is {chosen.kind}, exported with {versions_named(done.versions)}:\n\n{shell([shlex.join(words)])}"


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


def _use(chosen: Format, commands: Iterable[str]) -> str:
    if chosen.loading is None:
        return shell(commands)
    return f"{shell(commands)}\n\n{loading('AutoModelForCausalLM', arguments=chosen.loading)}"

"""The model card of a converted checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anymla.layouts import LAYOUTS, TARGETS, listed
from anymla.methods.base import Method
from anymla.methods.mla.settings import MLA

TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}
USE, FILES = "Use", "Files"  # sections that are written anew
FOLDER = "THIS_FOLDER"  # the hub's name of it, once it has one
LIBRARY = "library_name: transformers"
LOADS = (
    "It loads as the original does, after `import anymla` or with `trust_remote_code=True`. The original's licence and "
    "limits apply."
)


def model_card(report: Mapping[str, Any], auto: str) -> str:
    """README.md of the output folder: what it is, how it was made, what was measured, how to use it, its limits.

    ``report`` is conversion.json; ``auto`` names the Auto class that loads the model.
    """
    before, after, recipe = report["before"], report["after"], report["recipe"]
    source, commit = report["model"], report["commit"]
    repo = public_name(source).partition("@")[0]
    base = f"base_model: {repo}\n" if "/" in repo else ""
    text = public_name(recipe["calibration"] or "the stories bundled with anymla")
    kept = after["cache_bytes_per_token"] / before["cache_bytes_per_token"]
    return f"""---
{LIBRARY}
pipeline_tag: {TASKS[auto]}
tags: [anymla, multi-head-latent-attention, kv-cache]
{base}---

# {public_name(source)} with multi-head latent attention, {kept:.2%} of the KV cache{_headline(recipe)}

{scores_shown(report)}{_window(recipe)}
Calibration text: {text}.{_from(repo, commit)}

## How it was made

{shell([command(source, recipe)])}

{_method(recipe)} All settings are in `recipe.yaml`, every layer's sizes in `plan.yaml`, and all measurements in
`conversion.json`. Made with {versions_named(report["versions"])}.

## {USE}

{loading(auto, first="import anymla  # or: trust_remote_code=True below")}

{_serving(recipe)}

## Limits

- The original's licence and limits apply.
- Quality was measured on text like the calibration text. On other text it may be lower.
- Dropped rotations are right for distances within a calibration window, at most {recipe["calibration_length"]} tokens.
{"".join(f"- Of the original, {note}.{chr(10)}" for note in report["notes"])}"""


def scores_shown(report: Mapping[str, Any]) -> str:
    """Scores and bytes before and after as a table, with how they were measured; ``report`` is conversion.json."""
    rows = "\n".join(
        f"| {name} | {scores['perplexity']:.4g} | {scores['kl']:.4g} | {scores['top1_agreement']:.1%} "
        f"| {scores['cache_bytes_per_token']:g}{_once(scores)} "
        f"| {' | '.join(f'{sizes[when]:,}' for sizes in report['cache_bytes_at'].values())} |"
        for name, when, scores in (("original", "before", report["before"]), ("converted", "after", report["after"]))
    )
    lengths = " | ".join(f"bytes at {int(length):,} tokens" for length in report["cache_bytes_at"])
    return f"""On {report["after"]["tokens"]:,} held-out tokens of calibration text:

| | perplexity | KL to the original | same top token | cache bytes per token | {lengths} |
|---|---:|---:|---:|---:|{"---:|" * len(report["cache_bytes_at"])}
{rows}

The cache per token is measured from its tensors.{_slides(report)}"""


def _from(repo: str, commit: str | None) -> str:
    return "" if commit is None else f" The original is commit `{commit}` of {repo}."


def _headline(recipe: Mapping[str, Any]) -> str:
    return f" and a window of {recipe['exact_window']} exact tokens" if recipe["exact_window"] else ""


def _once(scores: Mapping[str, Any]) -> str:
    return f" + {scores['cache_window_bytes']:,} once" if scores["cache_window_bytes"] else ""


def _slides(report: Mapping[str, Any]) -> str:
    each = report["before"]["cache_bytes_per_token"]
    if all(sizes["before"] >= int(length) * each for length, sizes in report["cache_bytes_at"].items()):
        return ""
    return " Layers with a sliding window hold only their window, so long texts take less than that per token."


def _window(recipe: Mapping[str, Any]) -> str:
    if not recipe["exact_window"]:
        return ""
    return (
        f" The last {recipe['exact_window']} tokens have full keys and values too. Their bytes do not grow with the "
        "context."
    )


def _serving(recipe: Mapping[str, Any]) -> str:
    if recipe["exact_window"]:
        return "It runs in transformers, with a DynamicCache. The latent attention of engines cannot hold exact tokens."
    engines = listed(dict.fromkeys(engine for layout in LAYOUTS.values() for engine in layout.engines), "and")
    first, *others = TARGETS
    further = ", ".join(f"`{name}`" for name in others)
    return f"For {engines}: `anymla export {FOLDER} --to {first}` (or {further}) `-o OUT`."


def command(source: str, recipe: Mapping[str, Any]) -> str:
    """The command that makes the model again: what differs from the defaults, spelled out."""
    words = ["anymla", "convert", public_name(source), "-o", "OUT"]
    for name, field in MLA.model_fields.items():
        option, value = name.replace("_", "-"), recipe.get(name)
        if isinstance(value, bool) and value != field.default:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif name == "kv_cache" or value not in (field.default, None):
            words += [f"--{option}", public_name(str(value)) if name in ("calibration", "adapter") else str(value)]
    return shlex.join(words)


def public_name(source: str | Path) -> str:
    """Returns a hub id unchanged, and the last name of a local path: cards are published."""
    text = str(source)
    repo = text.partition("@")[0]  # a revision may hold slashes
    return text if repo.count("/") == 1 and not text.startswith((".", "/", "~")) else Path(text).name


def _method(recipe: Mapping[str, Any]) -> str:
    used = MLA.of({name: recipe[name] for name in ("rope", "factorization")}).papers()
    rope, latent = (f" ({paper.title})" if paper.link else "" for paper in used)
    papers = ", ".join(f"[{paper.title}]({paper.link})" for paper in dict.fromkeys([MLA.paper, *used]) if paper.link)
    return (
        f"Rope channels by `{recipe['rope']}`{rope}, latent by `{recipe['factorization']}`{latent}. If no system is "
        f"named, the method is anymla's own. Papers: {papers}."
    )


def step_card(method: Method, source: str | Path, card: str | None, told: str = "") -> str:
    """README.md after a step without a report of its own: ``card``, the one of the step before, with what it did.

    ``told``: what the method says of its plan, in Markdown.
    """
    rows = "".join(f"| `{name}` | {_public(value)} |\n" for name, value in method.model_dump(mode="json").items())
    title, link = method.paper.title, method.paper.link
    paper = f"[{title}]({link})" if link else title
    text = f"{method.summary}\n\nPaper: {paper}.\n\n| setting | value |\n|---|---|\n{rows}\n{told}"
    if card is None:
        card = f"---\n{LIBRARY}\ntags: [anymla]\n---\n\n# {public_name(source)} after {method.name}\n\n{LOADS}\n"
    return with_section(card, f"The step `{method.name}`", text)


def _public(value: Any) -> str:
    """A setting as a published card shows it: files and folders by their names alone."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_public, value))
    if isinstance(value, str) and "/" in value:
        return public_name(value)
    return "default" if value is None else str(value)


def static_norms_cost(lost: Sequence[float]) -> str:
    """Returns what ``norms_lost`` of the layers says, in words."""
    return (
        f"at full budget that alone would lose {sum(lost) / len(lost):.2%} of the hidden states after attention, "
        f"{max(lost):.2%} in the worst layer"
    )


def shell(commands: Iterable[str]) -> str:
    """The commands as a block of Markdown."""
    return "```sh\n" + "\n".join(commands) + "\n```"


def loading(auto: str, *, first: str = "", arguments: str = "") -> str:
    """Shows how the class ``auto`` of transformers loads the folder, in Markdown; ``first``: a line before."""
    head = f"{first}\n" if first else ""
    return f"""```python
{head}from transformers import {auto}

model = {auto}.from_pretrained("{FOLDER}"{arguments})
```"""


def versions_named(versions: Mapping[str, str]) -> str:
    """Packages and their versions, in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def with_section(card: str, heading: str, text: str) -> str:
    """``card`` with ``text`` below ``## heading``: in place of what stood there, or at the end."""
    section = f"## {heading}\n\n{text.strip()}\n"
    found = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if found.search(card):
        return found.sub(lambda _: f"{section}\n", card, count=1).rstrip() + "\n"
    return f"{card.rstrip()}\n\n{section}"

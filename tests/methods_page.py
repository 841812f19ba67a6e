"""Writes docs/methods.md out of what methods say of themselves.

python -m tests.methods_page
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from anymla.methods.base import Method, Phase, all_methods
from anymla.recipe import composes_with

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
HEAD = """# Methods

A recipe is a list of steps, and each step is a method with its settings:

```yaml
model: HuggingFaceTB/SmolLM2-135M
steps:
  - mla: {kv_cache: 0.25}
  - tune: {data: text.jsonl}
```

`anymla run recipe.yaml -o OUT` runs it. So does `anymla run MODEL -o OUT --step 'mla: {kv_cache: 0.25}'`, with one
`--step` for each. Every step leaves an ordinary checkpoint. `anymla methods` lists the methods in the terminal. This
page is made from the methods themselves (`make methods`). [CONTRIBUTING](../CONTRIBUTING.md) says how to add one.
"""


def methods_page() -> str:
    """The page, as Markdown."""
    known = list(all_methods().values())
    order = " < ".join(phase.name for phase in Phase)
    rows = [
        f"| [{each.name}](#{each.name}) | {each.phase.name} | {_listed(each.saves)} | {_paper(each)} |"
        for each in known
    ]
    table = ["| step | phase | saves | paper |", "|---|---|---|---|", *rows]
    phases = (
        f"Steps are in the order of their phases: {order}. HEAL may be repeated before WEIGHTS, "
        "and it may follow CACHE: `tune` then learns with the codes in the forward pass. Zero points learn after "
        "WEIGHTS (`tune` with `train: zero_points`)."
    )
    return "\n".join([HEAD, phases, "", *table, "", *(_section(each, known) for each in known)])


def _section(method: type[Method], known: list[type[Method]]) -> str:
    """What a method does, and its settings."""
    text = inspect.cleandoc(method.__doc__ or "")
    rows = [_row(name, field) for name, field in method.model_fields.items()]
    with_others = _listed([f"`{name}`" for name in composes_with(method, known)])
    lines = [
        f"### {method.name}",
        "",
        method.summary,
        "",
        text,
        "",
        f"Paper: {_paper(method)}. Goes with: {with_others}.",
    ]
    return "\n".join([*lines, "", "| setting | default | |", "|---|---|---|", *rows, ""])


def _row(name: str, field: Any) -> str:
    default = "" if field.is_required() else f"`{field.default}`" if field.default is not None else "-"
    return f"| `{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |"


def _paper(method: type[Method]) -> str:
    paper = method.paper
    return paper.title if paper.link is None else f"[{paper.title}]({paper.link})"


def _listed(items: Any) -> str:
    return ", ".join(items) or "-"


if __name__ == "__main__":
    PAGE.write_text(methods_page(), encoding="utf-8")

"""What `anymla methods` shows: all steps, or one with its settings."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from anymla.methods.base import Method, Phase
from anymla.recipe import composes_with
from anymla.settings import MOST

BOUNDS = (("exclusiveMinimum", "above"), ("minimum", "from"), ("exclusiveMaximum", "below"), ("maximum", "to"))
WORDS = {"integer": "a whole number", "number": "a number", "string": "a text", "array": "a list", "object": "names"}


def methods_table(known: Sequence[type[Method]]) -> Group:
    """All steps by phase, and how to learn more."""
    result = Table.grid(padding=(0, 2))
    for phase in Phase:
        result.add_row(Text(phase.name, style="bold"))
        for each in known:
            if each.phase == phase:
                saves = f"Saves: {', '.join(each.saves)}." if each.saves else "Heals."
                paper = f" arXiv {each.paper.arxiv}." if each.paper.arxiv else ""
                result.add_row(f"  {each.name}", f"{each.summary}. {saves}{paper}")
    lead = Text("Steps of a recipe. They run in the order of their phases.\n")
    return Group(lead, result, Text("\nOne step with its settings: anymla methods STEP"))


def method_shown(method: type[Method], known: Sequence[type[Method]]) -> Group:
    """One step: what it does, what it goes with, its settings with defaults and bounds, and an example."""
    paper = f"{method.paper.title}, {method.paper.link}" if method.paper.link else method.paper.title
    facts = Table.grid(padding=(0, 2))
    facts.add_row("saves", ", ".join(method.saves) or "nothing: it recovers quality")
    facts.add_row("phase", f"{method.phase.name} of {', '.join(phase.name for phase in Phase)}")
    facts.add_row("goes with", ", ".join(composes_with(method, list(known))) or "no other step")
    facts.add_row("paper", paper)
    told = inspect.cleandoc(method.__doc__ or "").replace("``", "")
    paragraphs = [Text(f"{' '.join(part.split())}\n") for part in told.split("\n\n")]
    return Group(
        Text(method.name, style="bold"),
        Text(f"{method.summary}\n"),
        *paragraphs,
        facts,
        Text("\nSettings", style="bold"),
        *(part for setting in settings_of(method) for part in _setting(setting)),
        Text("\nExample", style="bold"),
        Text(f"  {example(method)}", overflow="ignore", no_wrap=True),
    )


def settings_of(method: type[Method]) -> list[dict[str, Any]]:
    """Name, default, what is allowed, and description of every setting."""
    schema = method.model_json_schema()
    return [
        {
            "name": name,
            "default": field.get_default(call_default_factory=True),
            "allowed": _allowed(schema["properties"][name]),
            "description": field.description or "",
        }
        for name, field in method.model_fields.items()
    ]


def example(method: type[Method]) -> str:
    """A command that runs the step."""
    with_default = {each["name"]: each["default"] for each in settings_of(method) if each["default"] is not None}
    settings = method.example or dict(list(with_default.items())[:1])
    step = yaml.safe_dump({method.name: settings}, default_flow_style=True, width=1000).strip()[1:-1]
    return f"anymla run MODEL -o OUT --step {shlex.quote(step)}"


def _setting(setting: Mapping[str, Any]) -> tuple[Text, Padding]:
    default = setting["default"]
    shown = "" if default is None else f" [default: {str(default).lower() if isinstance(default, bool) else default}]"
    head = Text.assemble("  ", (setting["name"], "bold"), f": {setting['allowed']}{shown}")
    return head, Padding(Text(setting["description"]), (0, 0, 0, 6))


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a setting may be, in words; ``schema``: pydantic's of it."""
    if "anyOf" in schema:
        return " or ".join(_allowed(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        *first, last = map(str, schema.get("enum", [schema.get("const")]))
        return f"{', '.join(first)} or {last}" if first else last
    if schema.get("type") == "boolean":
        return "true or false"
    if "items" in schema:
        return f"a list, each {_allowed(schema['items'])}" if schema["items"] else "a list"
    bounds = [f"{word} {schema[name]}" for name, word in BOUNDS if name in schema and schema[name] < MOST]
    return " ".join([WORDS.get(schema.get("type", ""), "a value"), *bounds])

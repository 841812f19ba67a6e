"""Settings: frozen objects whose fields are YAML keys, help texts and rows of the docs; a wrong one is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from anymla.errors import RecipeError, did_you_mean, shown

MOST_BYTES = 1 << 20  # of a recipe or plan: a plan of a thousand layers has a fifth of it
MOST = 1 << 40  # of any number of tokens or dims

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Settings in one frozen object; a wrong one is named with its place and value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def of(cls, settings: dict[str, Any], source: str = "recipe") -> Self:
        """Checks ``settings``; the error names the field, its value and where it stood.

        Raises:
            RecipeError: an unknown field, or a value of the wrong kind or out of range.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise RecipeError(f"{source}: {cls._told(error.errors()[0])}") from error

    @classmethod
    def _told(cls, wrong: Any) -> str:
        """What is wrong with a setting, and what it may be; ``wrong``: as pydantic says it."""
        value = "" if wrong["type"] in ("extra_forbidden", "value_error") else f", got {shown(wrong['input'])}"
        if wrong["type"] == "extra_forbidden" and len(wrong["loc"]) == 1:
            (name,) = wrong["loc"]
            step = getattr(cls, "name", None)
            subject = "there is" if step is None else f"{step} has"
            allowed = (
                f"the settings are {', '.join(cls.model_fields)}" if step is None else f"see anymla methods {step}"
            )
            return f"{subject} no setting {shown(name)}{did_you_mean(name, cls.model_fields)}; {allowed}"
        if wrong["type"] == "literal_error":
            value += did_you_mean(wrong["input"], re.findall("'([^']*)'", wrong["ctx"]["expected"]))
        if wrong["type"] == "less_than_equal" and cls._is_share(wrong["loc"]):
            value += "; it is a share: 0.125 is 12.5 %"
        place = f"{where(wrong['loc'])}: " if wrong["loc"] else ""
        said = wrong["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
        return f"{place}{said}{value}"

    @classmethod
    def _is_share(cls, place: tuple[Any, ...]) -> bool:
        field = cls.model_fields.get(str(place[-1])) if place else None
        return field is not None and "share of" in str(field.description).lower()

    def to_yaml(self) -> str:
        """The settings as YAML, every field spelled out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def where(place: tuple[int | str, ...]) -> str:
    """The place of a value in nested settings, as a.b.c, in printable characters."""
    name = ".".join(str(part) for part in place)
    return f"{name:.80}" if name.isprintable() else shown(name)


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can make a small file grow without end, and no name twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                problem = f"{shown(key.value)} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RecipeError: missing, unreadable, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise RecipeError(f"{path} has more than {MOST_BYTES >> 20} MiB: too large for a recipe or a plan")
        decoded = text.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path} cannot be read: {' '.join(str(error).split()):.200}") from error
    content = parse_yaml(decoded, str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold names and values, as 'steps: [mla]' or 'kv_cache: 0.25'")
    if odd := [name for name in content if not isinstance(name, str)]:
        raise RecipeError(f"{path}: {shown(odd[0])} is no name of a setting")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Returns what ``text`` holds; ``source`` is how messages name it.

    Raises:
        RecipeError: it is no plain YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        marks = [mark for mark in (error.context_mark, error.problem_mark) if mark is not None]
        lines = " to line ".join(dict.fromkeys(str(mark.line + 1) for mark in marks))
        told = ", ".join(each for each in (error.context, error.problem) if each)
        raise RecipeError(f"{source} cannot be read: line {lines}: {' '.join(told.split()):.200}") from error
    except Exception as error:  # beside its own errors, PyYAML lets through what dates and numbers of no sense raise
        raise RecipeError(f"{source} cannot be read: {' '.join(str(error).split()):.200}") from error

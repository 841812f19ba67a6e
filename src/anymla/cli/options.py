"""What several commands share: the app, the consoles, options, and how a recipe becomes options."""

from __future__ import annotations

import functools
import inspect as python_inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console

from anymla.cli.groups import App
from anymla.codec_choice import CODEC
from anymla.methods.base import Method
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.mla.settings import MLA
from anymla.recipe import read_mla
from anymla.settings import DtypeName, parse_yaml

app = App(
    name="anymla",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plain = functools.partial(Console, highlight=False, markup=False, emoji=False)  # file names may hold brackets
out, err = plain(), plain(stderr=True)

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a GGUF file, an adapter's folder, or a hub id, also org/name@revision.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a MODEL on the hub. org/name@revision means the same."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="A YAML file with any of these settings, or a recipe with the step mla. Options override it."
    ),
]
Codec = Annotated[str, typer.Option(help=CODEC)]
Device = Annotated[str, typer.Option(help=MLA.model_fields["device"].description)]
Adapter = Annotated[str | None, typer.Option(help=MLA.model_fields["adapter"].description)]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Dtype to run in. Default: the checkpoint's, or float32 if this CPU is faster in it."),
]


def options_of(*kinds: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option per field of ``kinds``, and hands it the ones that were set as ``settings``."""
    return functools.partial(_with_options, kinds)


def _with_options(kinds: tuple[type[BaseModel], ...], command: Callable[..., None]) -> Callable[..., None]:
    fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}
    fields = {name: fields[name] for kind in kinds for name in kind.model_fields}

    @functools.wraps(command)
    def with_settings(**arguments: Any) -> None:
        settings = {name: arguments.pop(name) for name in fields}
        given = {name: value for name, value in settings.items() if value not in (None, [])}
        words = {name: parse_yaml(given[name], f"--{name}") for name in given if _number_or_word(fields[name])}
        command(**arguments, settings=given | words)

    own = python_inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "settings"]
    for name, field in fields.items():
        option = typer.Option(help=f"{field.description}{_default(name, kinds)}", show_default=False)
        value = str if _number_or_word(field) else field.annotation
        annotation: Any = Annotated[Optional[value], option]  # noqa: UP045
        kind = python_inspect.Parameter.KEYWORD_ONLY
        parameters.append(python_inspect.Parameter(name, kind, default=None, annotation=annotation))
    ordered = sorted(parameters, key=lambda parameter: parameter.default is not python_inspect.Parameter.empty)
    keyword_only = [parameter.replace(kind=python_inspect.Parameter.KEYWORD_ONLY) for parameter in ordered]
    with_settings.__signature__ = python_inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return with_settings


def _number_or_word(field: FieldInfo) -> bool:
    """Whether a field takes a number or a word, which no option can say."""
    return {float} < {*get_args(field.annotation)} - {type(None)}


def _default(name: str, kinds: tuple[type[BaseModel], ...]) -> str:
    """The default as a help text shows it, by the step where they differ."""
    found = {kind: kind.model_fields[name].default for kind in kinds if name in kind.model_fields}
    if len({*map(str, found.values())}) == 1:
        default = next(iter(found.values()))
        return "" if default is None else f" [default: {default}]"
    told = {kind: default for kind, default in found.items() if default is not None}  # None: its description says
    each = (f"{default} of {getattr(kind, 'name', kind.__name__)}" for kind, default in told.items())
    return f" [default: {', '.join(each)}]"


recipe_options = options_of(MLA, TransformCoding)


def print_json(content: Any) -> None:
    """Prints ``content`` to stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def file_recipe(path: Path | None) -> MLA | None:
    """The settings of the step mla in a recipe file."""
    return None if path is None else MLA.of(read_mla(path), "settings")


def print_note(text: str) -> None:
    """Prints what the user should know to stderr."""
    err.print(f"note: {text}", soft_wrap=True)


def print_next(output: Path, original: str, seconds: float, method: Method | None = None) -> None:
    """Ends a command that wrote a model to ``output``: what to do with it, beside the ``original``.

    ``method``: the step that made it; its target and cache type say how to export it.
    """
    folder, other = shlex.quote(str(output)), shlex.quote(str(original))
    out.print(f"Wrote {output} in {seconds:.0f} s.", soft_wrap=True)
    print_page(output)
    out.print("Next:")
    out.print(f"  anymla chat {folder} --against {other}", soft_wrap=True)
    out.print(f"  anymla compare {other} {folder} --text YOUR.txt", soft_wrap=True)
    if isinstance(method, MLA) and method.target is not None:
        out.print(f"  anymla export {folder} --to {method.target}{method.cache_option} -o SERVED", soft_wrap=True)


def print_page(output: Path) -> None:
    """Says where the page is that lies in ``output``."""
    from anymla.report.page import PAGE

    out.print(f"Report: {output / PAGE}", soft_wrap=True)


def first_process() -> bool:
    """Returns whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def how_to_go_on() -> Iterator[None]:
    """Ends what was stopped with what it says about itself."""
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.stderr.write("\n".join(getattr(stop, "__notes__", ["stopped"])) + "\n")
        sys.exit(130)

"""The command line. Torch is imported inside the commands only, so that help and inspect answer at once."""

from __future__ import annotations

import functools
import io
import logging
import re
import sys
from typing import Annotated, Any, NoReturn

import typer

from anymla import __version__
from anymla.cli import compare, convert, doctor, evaluate, export, generate, push, refresh, run, tune
from anymla.cli.options import app, out
from anymla.errors import AnymlaError, shown

__all__ = [
    "app",
    "command_line",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "main",
    "push",
    "refresh",
    "run",
    "tune",
]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"anymla {__version__}")
        raise typer.Exit


GREETING = """\
anymla turns a trained Transformer into one with a smaller KV cache. Begin with:

  anymla demo                        convert a small model, compare it with the original, write a page
  anymla inspect MODEL               what a model's cache costs, and whether it can be converted
  anymla convert MODEL -o OUT        convert it to an eighth of its cache
  anymla chat OUT --against MODEL    talk with both, and see their caches grow

anymla doctor shows what this machine has. All commands: anymla --help. Options of one: anymla convert --help"""


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make the KV cache of a trained Transformer LLM smaller: latent attention, codes of a few bits, other steps."""
    if context.invoked_subcommand is None:
        out.print(GREETING, soft_wrap=True)


@functools.cache
def command_line() -> Any:
    """The command of all commands."""
    return typer.main.get_command(app)


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    _quiet_libraries()
    try:
        code = command_line()(prog_name="anymla", standalone_mode=False)
        if code == 130:  # typer makes Ctrl-C this code
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except MemoryError as error:
        _fail(f"out of memory ({error}); lower --calibration-tokens, --calibration-length or --batch-size")
    except AnymlaError as error:
        _fail(str(error))
    except RuntimeError as error:  # torch's own out of memory
        if "memory" not in str(error):
            raise
        options = "--calibration-tokens, --calibration-length or --batch-size"
        _fail(f"{error!s:.200}; lower {options}, or give another --device")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the option parser raises; typer has its own copy of click
            raise
        _fail(_with_value(error.format_message(), sys.argv))


def _with_value(message: str, arguments: list[str]) -> str:
    """What the option parser says of a number, with the value that was given, which the parser leaves out."""
    said, unparsed, _ = message.partition(", unable to parse string")
    option = re.search("'(-[^']*)'", said)
    words = [(*word.partition("="), after) for word, after in zip(arguments, [*arguments[1:], ""], strict=True)]
    given = [value if equals else after for name, equals, value, after in words if option and name == option[1]]
    if not unparsed or not given:
        return message
    share = re.fullmatch(r"(\d+(?:\.\d+)?) *%", given[-1]) if "valid number" in said else None
    return f"{said}, got {shown(given[-1])}" + (f": write {float(share[1]) / 100:g}" if share else "")


def _quiet_libraries() -> None:
    """Silences what transformers imports where it is installed, and what warns of kernels that the machine lacks."""
    for name in ("bitsandbytes", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {''.join(each if each.isprintable() else repr(each)[1:-1] for each in line)}\n")
    sys.exit(1)

"""The errors a user can meet. Each names what is wrong, where, and the option to change."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3


class AnymlaError(Exception):
    """Base of all errors that anymla raises on purpose; the command line prints them as one line."""


class UnsupportedModelError(AnymlaError, ValueError):
    """The model cannot be converted; known from its config, before any weight is read."""


class InfeasibleError(AnymlaError, ValueError):
    """The settings cannot be met for this model; names the nearest ones that can."""


class RecipeError(AnymlaError, ValueError):
    """A recipe or plan file, or an option, has an unknown name or a value of the wrong kind."""


class CheckpointError(AnymlaError, ValueError):
    """A checkpoint's files are missing, broken or not safetensors."""


class TextError(AnymlaError, ValueError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class ParityError(AnymlaError, ValueError):
    """An export does not compute what the converted model does."""


class OutputError(AnymlaError, OSError):
    """The output folder exists or cannot be written."""


def shown(value: object) -> str:
    """A value as a message shows it: one short line of printable characters, however large or deep it is."""
    return f"{_REPR.repr(value):.60}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The name of ``known`` that comes nearest to a wrong one, in brackets; empty where none is near."""
    near = get_close_matches(f"{name!s:.60}", known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""

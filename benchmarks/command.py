"""What the command lines of benchmarks on one model's cache share: options, the model, its texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from cache_bench import Protocol
from fidelity import text_of

from anymla.io.real_models import PACKAGES, real_model


def parser_of(about: str | None, *, calibration_tokens: int, windows: int) -> argparse.ArgumentParser:
    """A parser of the options that say where results go, on what text, and which rows."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"))
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--held-out", type=Path, nargs="+")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--calibration-tokens", type=int, default=calibration_tokens)
    parser.add_argument("--windows", type=int, default=windows, help="of each held-out text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    return parser


def folder_of(model: Path) -> Path:
    """The model's folder; the one that is fetched, where a package carries it."""
    return real_model(str(model), print) if str(model) in PACKAGES else model


def protocol_of(model: Path, given: argparse.Namespace) -> Protocol:
    """The texts and sizes that ``given`` options mean for ``model``."""
    texts = (text_of(model, given.text, "train"), text_of(model, given.held_out, "valid"))
    return Protocol(*texts, given.calibration_tokens, given.windows, given.length)

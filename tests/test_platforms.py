"""Systems other than Linux, as far as Linux can tell: what they lack is neither imported nor asked for."""

from __future__ import annotations

import ast
import ctypes
import os
import sys

import pytest

import anymla
from anymla.io import locks
from anymla.io.device import machine_memory, peak_rss
from tests.damage import BUNDLED
from tests.markdown import ROOT
from tests.page_commands import CALIBRATED

UNIX = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}  # modules that Windows lacks
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def imported_at_once(tree):
    """Modules that a file imports when it is loaded, whatever the system."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from names


def test_nothing_imports_at_once_what_windows_lacks():
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        assert not UNIX & {name.partition(".")[0] for name in imported_at_once(tree)}, source


@pytest.fixture
def windows(monkeypatch):
    """What Windows says of itself, and some of what it refuses."""

    def by_name(name, *rest, real=ctypes.CDLL, **named):
        if name is None:
            raise TypeError("a library has a name")
        return real(name, *rest, **named)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(locks, "os", None)  # no folder can be opened there
    monkeypatch.setattr(ctypes, "CDLL", by_name)
    monkeypatch.delattr(os, "sysconf")
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_conversion_asks_for_nothing_that_windows_lacks(windows, tmp_path):
    anymla.convert(BUNDLED, tmp_path / "OUT", **CALIBRATED)
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
    anymla.convert(BUNDLED, tmp_path / "OUT", overwrite=True, **CALIBRATED)
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


def test_memory_is_counted():
    assert 1 << 27 < peak_rss() < machine_memory() < 1 << 50

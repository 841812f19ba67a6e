"""What results depend on, as it is installed here."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions(*others: str) -> dict[str, str]:
    """The versions of anymla, what it stands on, and ``others``, packages by name."""
    packages = {name: version(name) for name in ("anymla", "torch", "transformers", *others)}
    return packages | {"python": platform.python_version()}

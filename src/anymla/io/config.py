"""Reads JSON objects that may be anything, and finds in a config what no loader should be given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anymla.errors import CheckpointError, shown
from anymla.io.mistaken import stand_in

MOST_BYTES = 64 << 20  # of a JSON file: the index of the largest models has a few
MOST_LAYERS = 1000
MOST_SIZE = 1 << 24  # of any width, vocabulary or context
_SIZES = (  # of names of fields that end so
    (re.compile(r"layers?$"), MOST_LAYERS),
    (re.compile(r"(experts|labels)$"), 10_000),
    (re.compile(r"(heads?|size|dim|embd|embed|inner|rank|positions|_embeddings|d_model|n_ctx)$"), MOST_SIZE),
)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON in UTF-8, or not an object.
    """
    try:
        if (length := path.stat().st_size) > MOST_BYTES:
            raise CheckpointError(f"{path} has {length >> 20} MiB: too large for a JSON file of a checkpoint")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        found = stand_in(path)
        reason = f"{error!s:.160}" if found is None else f"it is {found}"
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def danger(config: Mapping[str, Any]) -> str | None:
    """Returns what in a parsed config must not reach a loader, or None.

    A size larger than any model's: it would begin to make such a model, and only then find that its weights are not
    there. Attention by a kernel from the hub, ``org/name``: it would fetch and run it.
    """
    for name, value in _leaves(config):
        field = name.rpartition(".")[2]
        most = next((most for pattern, most in _SIZES if pattern.search(field)), None)
        if isinstance(value, int) and most is not None and value > most:
            return f"config.json: {name:.80} is {shown(value)}; no model has more than {most}"
        if isinstance(value, str) and "implementation" in name and "/" in value:
            return f"config.json: {name:.80} {shown(value)} is code from the hub, which anymla does not run"
    return None


def _leaves(config: Mapping[str, Any], prefix: str = "", depth: int = 5) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if not isinstance(value, Mapping):
            yield f"{prefix}{name}", value
        elif depth:
            yield from _leaves(value, f"{prefix}{name}.", depth - 1)

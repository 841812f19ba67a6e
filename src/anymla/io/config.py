"""Reads JSON objects that may be anything, and refuses sizes that no model has, before memory is taken for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anymla.errors import CheckpointError, shown

MOST_BYTES = 64 << 20  # of a JSON file: the index of the largest models has a few
MOST_LAYERS = 1000
MOST_EXPERTS = 10_000
MOST_SIZE = 1 << 24  # of any width, vocabulary or context

_SIZES = re.compile(r"(layers?|heads?|experts|size|dim|embd|embed|inner|rank|positions|_embeddings|d_model|n_ctx)$")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON in UTF-8, or not an object.
    """
    try:
        if (length := path.stat().st_size) > MOST_BYTES:
            raise CheckpointError(f"{path} has {length >> 20} MiB: too large for a JSON file of a checkpoint")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {error!s:.160}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def oversized(config: Mapping[str, Any]) -> str | None:
    """Which size in a parsed config is larger than any model's, or None. Says nothing of values that are no integers.

    A loader would begin to make such a model, and only then find that its weights are not there.
    """
    for name, value in _integers(config):
        field = name.rpartition(".")[2]
        most = MOST_LAYERS if field.endswith(("layers", "_layer")) else MOST_SIZE
        most = MOST_EXPERTS if field.endswith("experts") else most
        if _SIZES.search(field) and value > most:
            return f"config.json: {name:.80} is {shown(value)}; no model has more than {most}"
    return None


def _integers(config: Mapping[str, Any], prefix: str = "", depth: int = 3) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth:
            yield from _integers(value, f"{prefix}{name}.", depth - 1)

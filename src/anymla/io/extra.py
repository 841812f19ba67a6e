"""Tensors that a checkpoint holds and its model has no place for: which are left out, which show another model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

NUMBERED = re.compile(r"(?P<layer>(?:^|.*?\.)(?P<index>\d+))\.")
OLD_BUFFERS = r"\.attn(\.attention)?\.(bias|masked_bias|causal_mask)$|\.inv_freq$"  # masks, not weights
CACHE_SCALES = r"\.([qkv]|kv|prob)_(scale|zero_point)$|\.[kv]_proj\.output_scale$"  # of engines' quantised KV caches
NEXT_TOKENS = r"(^|\.)(mtp|nextn)[a-z_]*\."  # layers that predict further tokens, in a part of their own
IGNORED = re.compile(f"{OLD_BUFFERS}|{CACHE_SCALES}|{NEXT_TOKENS}")
NEXT_TOKEN_PARTS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|embed_tokens|mtp\w*|nextn\w*)\.")  # of a last layer
NEXT_TOKEN_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def misplaced(names: Iterable[str], config: Any) -> list[str]:
    """Returns those of the tensors without a place whose layer is the model's, or should be: they show another model.

    Masks, scales of a quantised KV cache and layers that predict further tokens are none of it.
    """
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    declared = sum(int(getattr(text, field, None) or 0) for field in NEXT_TOKEN_FIELDS)
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        if (found := NUMBERED.match(name)) and not IGNORED.search(name):
            groups[found["layer"], int(found["index"])].append(name)
    return [
        name
        for (_, index), group in groups.items()
        if not (index >= layers and (index < layers + declared or any(map(NEXT_TOKEN_PARTS.search, group))))
        for name in group
    ]


def left_out(names: Sequence[str]) -> list[str]:
    """A note on tensors that the model does not use; none where there are none."""
    if not names:
        return []
    many = f"{len(names)} tensors in the files, {names[0]} first, have" if len(names) > 1 else f"{names[0]} has"
    return [f"{many} no place in the model and {'were' if len(names) > 1 else 'was'} left out, as transformers does"]

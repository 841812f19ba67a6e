"""What config.json says of layers that share attention maps.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_spec import AttentionSpec
from .described import checked, shortened
from .slot_spec import Slot


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """A layer that attends by the map of an earlier layer, or whose own map later layers use.

    Args:
        source_layer: index of the layer whose map it uses; None: it makes its own and hands it on.
        biases: whether its projections have biases.
    """

    source_layer: int | None = None
    biases: bool = True

    def slots(self, attention: AttentionSpec, window: int | None) -> tuple[Slot, ...]:
        """What the cache of such a layer holds: no keys where it uses another's map.

        ``window``: most tokens that it keeps, None: all.
        """
        names = ("keys", "values") if self.source_layer is None else ("values",)
        width = attention.num_kv_heads * attention.head_dim
        return tuple(Slot(name=name, width=width, tokens=window) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return shortened(self) or {}

    @classmethod
    def of(cls, described: Any, attention: AttentionSpec | None) -> SharedSpec:
        """What ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        found = cls(**checked(cls, described))
        source = found.source_layer
        if source is not None and (not isinstance(source, int) or isinstance(source, bool) or source < 0):
            raise ValueError(f"SharedSpec: source_layer must be the number of a layer, got {source!s:.20}")
        return found

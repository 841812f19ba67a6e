"""How an attention holds its cache whose heads share keys after rope, or values alone.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_spec import AttentionSpec
from .described import checked, shortened
from .slot_spec import Slot


@dataclass(frozen=True, kw_only=True)
class GroupedSpec:
    """N heads in the cache, each for a group of the original's G.

    Args:
        kv_heads: N.
        shares_keys: whether the cache has N heads of keys too, and not all G.
    """

    kv_heads: int
    shares_keys: bool = False

    def slots(self, attention: AttentionSpec, window: int | None) -> tuple[Slot, ...]:
        """What the cache of such a layer holds; ``window``: most tokens that it keeps, None: all."""
        keys = self.kv_heads if self.shares_keys else attention.num_kv_heads
        heads = {"keys": keys, "values": self.kv_heads}
        return tuple(Slot(name=name, width=each * attention.head_dim, tokens=window) for name, each in heads.items())

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return shortened(self) or {}

    @classmethod
    def of(cls, described: Any, attention: AttentionSpec | None) -> GroupedSpec:
        """The cache that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        found = cls(**checked(cls, described))
        if attention is None or not isinstance(found.kv_heads, int) or found.kv_heads < 1:
            raise ValueError("GroupedSpec: kv_heads must be a number of heads in a layer with attention")
        if attention.num_kv_heads % found.kv_heads:
            raise ValueError(f"GroupedSpec: kv_heads {found.kv_heads} does not divide {attention.num_kv_heads}")
        return found

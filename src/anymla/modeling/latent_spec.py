"""How a latent attention holds its cache.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_spec import AttentionSpec
from .described import checked, shortened
from .slot_spec import Slot, exact_slots


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """How a latent attention holds its cache: r numbers of latent, R = 2K of rope key.

    Args:
        kv_lora_rank, qk_rope_head_dim: r and R.
        channel_fold: rope pairs of a head that one channel reads; it rotates with the first one's frequency.
        biases: whether the query projection, what makes the latent, and the output projection have biases.
        exact_window: tokens that keep keys and values of their own beside the latent, the newest among them; 0: none.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    channel_fold: int = 1
    biases: bool = True
    exact_window: int = 0

    def slots(self, attention: AttentionSpec, window: int | None) -> tuple[Slot, ...]:
        """What the cache of such a layer holds; ``window``: most tokens that it keeps, None: all."""
        sizes = {"latent": self.kv_lora_rank, "rope_key": self.qk_rope_head_dim}
        slots = [Slot(name=name, width=width, tokens=window) for name, width in sizes.items()]
        return (*slots, *exact_slots(attention.cached_numbers // 2, self.exact_window))

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return shortened(self) or {}

    @classmethod
    def of(cls, described: Any, attention: AttentionSpec | None) -> LatentSpec:
        """The latent that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        return cls(**checked(cls, described))

"""How multi-matrix factorisation attention holds its cache and makes its queries.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_spec import AttentionSpec
from .described import checked, shortened
from .slot_spec import Slot


@dataclass(frozen=True, kw_only=True)
class MfaSpec:
    """Multi-matrix factorisation attention (arXiv 2412.19255): one head of keys and values for H heads of queries.

    A token's cache is a latent of r numbers and a rope key of R = 2K numbers, as in LatentSpec. With key reuse (MFA-KR)
    the whole latent is key and value. In MFA its last V numbers are the value, and the others belong to the key.

    Args:
        kv_lora_rank, qk_rope_head_dim: r and R.
        value_rank: V; 0: key reuse.
        q_lora_rank: Cq, numbers of which the queries of all heads are made; None: the H d of the original's queries.
        query_norm: whether an RMSNorm of these Cq numbers follows their projection.
        value_gate: whether the value of key reuse is k + alpha (N k), for training; None of it is left once folded.
        biases: whether the projections of queries, cache and output have biases.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    value_rank: int = 0
    q_lora_rank: int | None = None
    query_norm: bool = False
    value_gate: bool = False
    biases: bool = True

    @property
    def query_width(self) -> int:
        """C: numbers of a head's query."""
        return self.kv_lora_rank - self.value_rank + self.qk_rope_head_dim

    @property
    def value_width(self) -> int:
        """Numbers of a value."""
        return self.value_rank or self.kv_lora_rank

    def query_rank(self, attention: AttentionSpec) -> int:
        """Cq."""
        return self.q_lora_rank or attention.num_heads * attention.head_dim

    def slots(self, attention: AttentionSpec, window: int | None) -> tuple[Slot, ...]:
        """What the cache of such a layer holds; ``window``: most tokens that it keeps, None: all."""
        sizes = {"latent": self.kv_lora_rank, "rope_key": self.qk_rope_head_dim}
        return tuple(Slot(name=name, width=width, tokens=window) for name, width in sizes.items())

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return shortened(self) or {}

    @classmethod
    def of(cls, described: Any, attention: AttentionSpec | None) -> MfaSpec:
        """The attention that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        spec = cls(**checked(cls, described))
        sizes = {"kv_lora_rank": 1, "qk_rope_head_dim": 0, "value_rank": 0, "q_lora_rank": 1}
        for name, least in sizes.items():
            size = getattr(spec, name)
            if not (name == "q_lora_rank" and size is None) and (type(size) is not int or size < least):
                raise ValueError(f"MfaSpec: {name} must be {least} or more, got {size!s:.20}")
        if spec.value_rank > spec.kv_lora_rank:
            raise ValueError(f"MfaSpec: value_rank {spec.value_rank} is more than kv_lora_rank {spec.kv_lora_rank}")
        if spec.value_gate and spec.value_rank:
            raise ValueError("MfaSpec: value_gate is for key reuse, where value_rank is 0")
        return spec

"""What one layer's attention computes.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .described import checked


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Arguments of heads.query_temperature."""

    scale: float
    offset: float
    period: float


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention computes: H query heads, G key/value heads of d numbers, P pairs rotated by rope.

    The fields up to ``cached_heads`` are known from the config alone, those after it once the module was read.

    Args:
        num_heads, num_kv_heads, head_dim: H, G, d.
        rope_pairs: P.
        qkv_bias, output_bias, qk_norm: whether the original has them.
        sliding_window: tokens that a query sees; None: all before it.
        cache_window: tokens of which transformers' cache keeps all but the oldest; None: it keeps every token.
        cached_heads: heads in transformers' cache: H where a family repeats keys and values before they are cached.
        scaling: of scores, before soft-cap and mask.
        rope_table: where cos and sin come from (heads.rope_tables).
        norms: names of the query and key norm in the original; norm_over: see heads.split_heads.
        value_norm: name of a norm of the values.
        query_gain: a gain per dim of the head, put on queries after rope (a norm that its family applies there).
        clip: bound of the projected queries, keys and values.
        softcap: bound of the scores.
        sinks: whether every head has a logit that takes attention from the tokens.
        temperature: of queries, by position.
        position_bias: kind of bias on scores (heads.score_bias); local_window: tokens that 'window' lets through.
        gate: numbers per token of a gate on the heads' output, all of them or one per head; gate_activation: its
            function, of torch.nn.functional.
        output_norm: name of a norm before the output projection.
        adds_residual: whether the module itself adds the residual stream, its second argument.
        kept_numbers: numbers of all norms that are taken over from the original.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_pairs: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    cache_window: int | None = None
    cached_heads: int = 0

    scaling: float = 0.0
    rope_table: str = "halves"
    norms: tuple[str, str] | None = None
    norm_over: str = "head"
    value_norm: str | None = None
    query_gain: bool = False
    clip: float | None = None
    softcap: float | None = None
    sinks: bool = False
    temperature: Temperature | None = None
    position_bias: str | None = None
    local_window: int | None = None
    gate: int = 0
    gate_activation: str = "sigmoid"
    output_norm: str | None = None
    adds_residual: bool = False
    kept_numbers: int = 0

    @property
    def cached_numbers(self) -> int:
        """Numbers per token that a cache of keys and values needs: 2 G d."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def linear_queries(self) -> bool:
        """Whether the query is linear in its projection: no norm and no clip stands between."""
        return self.norms is None and self.clip is None

    @property
    def linear_values(self) -> bool:
        """Whether values are linear in x."""
        return self.value_norm is None and self.clip is None

    @property
    def linear_keys(self) -> bool:
        """Whether keys and values are linear in x, so that one matrix makes latent and channels of x."""
        return self.linear_queries and self.linear_values

    @property
    def stored_numbers(self) -> int:
        """Numbers per token that transformers' cache of the original holds: the same, except for repeated heads."""
        return 2 * (self.cached_heads or self.num_kv_heads) * self.head_dim

    @classmethod
    def of(cls, described: Any) -> AttentionSpec:
        """The attention that ``config.json`` describes.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        fields = checked(cls, described)
        if (norms := fields.get("norms")) is not None:
            fields["norms"] = tuple(norms)
        if (temperature := fields.get("temperature")) is not None:
            fields["temperature"] = Temperature(**checked(Temperature, temperature))
        return cls(**fields)


CONFIG_FIELDS = (  # of AttentionSpec, that the config alone says
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_pairs",
    "qkv_bias",
    "output_bias",
    "qk_norm",
    "sliding_window",
    "cache_window",
    "cached_heads",
)

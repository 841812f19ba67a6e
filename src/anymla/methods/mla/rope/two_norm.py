"""Keep each kv head's own most used frequencies (MHA2MLA, arXiv 2502.14837, section 3.1, S_2-norm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.papers import MHA2MLA
from anymla.methods.mla.rope.choice import RopeChoice

if TYPE_CHECKING:
    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class TwoNorm(RopeChoice):
    """The k pairs of each kv head with the largest sum over its query heads of E||q_f|| E||k_f||."""

    name: ClassVar[str] = "two-norm"
    paper: ClassVar[Paper] = MHA2MLA
    summary: ClassVar[str] = "the frequencies that each head uses most"

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        from anymla.methods.mla.channels import per_head_channels

        kv_heads, pairs = moments.key_norm.shape
        score = moments.query_norm.view(kv_heads, -1, pairs).sum(1) * moments.key_norm
        frequencies = score.topk(rope_dims // 2 // kv_heads, dim=1).indices
        return per_head_channels(frequencies, pairs)

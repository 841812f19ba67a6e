"""Keep each kv head's own most used frequencies (MHA2MLA, arXiv 2502.14837, section 3.1, S_2-norm)."""

from __future__ import annotations

from dataclasses import dataclass

from anymla.methods.mla.moments import Moments
from anymla.methods.mla.rope.channels import Channels, per_head_channels


@dataclass(frozen=True)
class TwoNorm:
    """The k pairs of each kv head with the largest sum over its query heads of E||q_f|| E||k_f||."""

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        kv_heads, pairs = moments.key_norm.shape
        score = moments.query_norm.view(kv_heads, -1, pairs).sum(1) * moments.key_norm
        frequencies = score.topk(rope_dims // 2 // kv_heads, dim=1).indices
        return per_head_channels(frequencies, pairs)

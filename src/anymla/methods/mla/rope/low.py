"""Keep the lowest frequencies of every kv head (MHA2MLA, arXiv 2502.14837, section 3.1, S_low)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anymla.methods.mla.moments import Moments
from anymla.methods.mla.rope.channels import Channels, per_head_channels


@dataclass(frozen=True)
class Low:
    """The last k pairs: the slowest rotations."""

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        kv_heads, pairs = moments.key_norm.shape
        kept = rope_dims // 2 // kv_heads
        frequencies = torch.arange(pairs - kept, pairs, device=moments.key_norm.device)
        return per_head_channels(frequencies.expand(kv_heads, -1), pairs)

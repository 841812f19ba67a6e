"""Keep the highest frequencies of every kv head (MHA2MLA, arXiv 2502.14837, section 3.1, S_high)."""

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
class High(RopeChoice):
    """The first k pairs: the fastest rotations."""

    name: ClassVar[str] = "high"
    paper: ClassVar[Paper] = MHA2MLA
    summary: ClassVar[str] = "the highest frequencies of every head"

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        import torch

        from anymla.methods.mla.channels import per_head_channels

        kv_heads, pairs = moments.key_norm.shape
        kept = rope_dims // 2 // kv_heads
        frequencies = torch.arange(kept, device=moments.key_norm.device)
        return per_head_channels(frequencies.expand(kv_heads, -1), pairs)

"""Shared rope channels on a grid of frequencies, for layouts that know plain rope alone (anymla)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymla.methods.mla.rope.choice import RopeChoice

if TYPE_CHECKING:
    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class GridPCA(RopeChoice):
    """As channel-pca, but channel i is the eigenvector of frequency i * step that scores most.

    Their frequencies are a geometric series, so that plain rope with another base rotates them (docs/exporting.md).
    """

    step: int = 1

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        import torch

        from anymla.methods.mla.rope.channel_pca import principal_axes

        axes = principal_axes(moments, expected_rotation)
        frequency = torch.arange(rope_dims // 2, device=axes.score.device) * self.step
        return axes.channels(frequency, axes.score[frequency].argmax(1))

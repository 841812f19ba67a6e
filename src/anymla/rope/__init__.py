"""Choices of the rope channels, one file each."""

from anymla.rope.channel_pca import ChannelPCA, GridPCA, SpreadPCA
from anymla.rope.channels import Channels, RopeChoice, no_channels, per_head_channels
from anymla.rope.elite import Elite
from anymla.rope.high import High
from anymla.rope.low import Low
from anymla.rope.rorope import RoRoPE
from anymla.rope.two_norm import TwoNorm
from anymla.rope.uniform import Uniform

ROPE_CHOICES: dict[str, RopeChoice] = {
    "channel-pca": ChannelPCA(),
    "high": High(),
    "low": Low(),
    "uniform": Uniform(),
    "two-norm": TwoNorm(),
    "elite": Elite(),
    "rorope": RoRoPE(),
    **{f"freqfold-{fold}": RoRoPE(fold) for fold in (2, 4, 8, 16)},
}

__all__ = [
    "ROPE_CHOICES",
    "ChannelPCA",
    "Channels",
    "GridPCA",
    "RopeChoice",
    "SpreadPCA",
    "no_channels",
    "per_head_channels",
]

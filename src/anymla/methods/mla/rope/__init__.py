"""Choices of the rope channels, one file each."""

from anymla.methods.mla.rope.channel_pca import ChannelPCA, GridPCA, SpreadPCA
from anymla.methods.mla.rope.channels import Channels, RopeChoice, no_channels, per_head_channels
from anymla.methods.mla.rope.elite import Elite
from anymla.methods.mla.rope.high import High
from anymla.methods.mla.rope.low import Low
from anymla.methods.mla.rope.rorope import RoRoPE
from anymla.methods.mla.rope.two_norm import TwoNorm
from anymla.methods.mla.rope.uniform import Uniform

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

"""Shared rope channels by complex PCA across kv heads (anymla; docs/mathematics.md, 'Rope channels')."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.papers import OWN
from anymla.methods.mla.rope.choice import RopeChoice

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class PrincipalAxes:
    """Eigenvectors u_j of every frequency's pairs across kv heads, and what each would score as a channel.

    score [P,G], axes [P,G,G] complex (the last dimension counts eigenvectors), root [P,G]: D_f^{1/2}.
    """

    score: Tensor
    axes: Tensor
    root: Tensor

    def channels(self, frequency: Tensor, axis: Tensor) -> Channels:
        """The channels of eigenvectors ``axis`` [K] of frequencies ``frequency`` [K]."""
        from anymla.methods.mla.channels import Channels

        chosen, root = self.axes[frequency, :, axis], self.root[frequency]  # [K,G]
        encode = chosen.conj() * root
        scale = encode.abs().square().sum(1, keepdim=True).sqrt()
        return Channels(index=frequency, encode=encode / scale, decode=chosen / root * scale)


@dataclass(frozen=True)
class ChannelPCA(RopeChoice):
    """Top K of lambda_j (1 - |rho_f|^2) over all frequencies f and eigenvectors j.

    For each frequency, the pairs z_f of all kv heads, weighted by how strongly queries read them (D_f), are rotated to
    principal axes u_j: D_f^{1/2} E[z z^*] D_f^{1/2} u_j = lambda_j u_j. A channel scores its energy lambda_j times
    the part 1 - |rho_f|^2 of the rotation that an expected rotation rho cannot replace. Mixing kv heads within one
    frequency commutes with RoPE, so all channels together are exact.
    """

    name: ClassVar[str] = "channel-pca"
    paper: ClassVar[Paper] = OWN
    summary: ClassVar[str] = "principal components of each frequency across heads"
    shared: ClassVar[bool] = True

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        axes = principal_axes(moments, expected_rotation)
        kv_heads = axes.score.shape[1]
        best = axes.score.flatten().topk(rope_dims // 2).indices
        return axes.channels(best // kv_heads, best % kv_heads)


@dataclass(frozen=True)
class SpreadPCA(RopeChoice):
    """The same, but frequencies are spread evenly, and each gives the eigenvectors that score most.

    What scores most often lies in neighbouring frequencies, which carry much of the same. Gradient steps can change
    all of a channel but its frequency, and fewer steps bring more of channels that are spread.
    """

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        import torch

        from anymla.methods.mla.channels import spread

        axes = principal_axes(moments, expected_rotation)
        frequency = spread(len(axes.score), rope_dims // 2).to(axes.score.device)
        place = torch.arange(len(frequency), device=frequency.device) - torch.searchsorted(frequency, frequency)
        return axes.channels(frequency, axes.score.argsort(1, descending=True)[frequency, place])


def principal_axes(moments: Moments, expected_rotation: bool) -> PrincipalAxes:
    """All that could be a channel."""
    import torch

    heads, pairs = moments.rotation.shape
    kv_heads = moments.key_norm.shape[0]
    d = moments.query_gram.shape[-1]
    rotated = moments.query_gram.diagonal(dim1=1, dim2=2)[:, : 2 * pairs]
    query_power = rotated.reshape(heads, 2, pairs).sum(1)  # E|q_f|^2, [H,P]
    reading = moments.key_weight[:, None] * query_power
    read_by_group = reading.view(kv_heads, -1, pairs).sum(1).clamp_min(1e-30)  # D, [G,P]
    lost = _lost_rotation(moments, expected_rotation)
    lost_by_group = (reading * lost).view(kv_heads, -1, pairs).sum(1) / read_by_group

    gram = moments.weighted_gram[: kv_heads * d, : kv_heads * d].view(kv_heads, d, kv_heads, d)
    gram = gram[:, : 2 * pairs, :, : 2 * pairs].reshape(kv_heads, 2, pairs, kv_heads, 2, pairs)
    blocks = gram.diagonal(dim1=2, dim2=5)  # [G, 2, G, 2, P]
    hermitian = torch.complex(blocks[:, 0, :, 0] + blocks[:, 1, :, 1], blocks[:, 1, :, 0] - blocks[:, 0, :, 1])
    root = read_by_group.sqrt().T  # [P,G]
    energy, axes = torch.linalg.eigh(root[:, :, None] * hermitian.permute(2, 0, 1) * root[:, None, :])
    score = energy * (axes.abs().square() * lost_by_group.T[:, :, None]).sum(1)
    return PrincipalAxes(score=score, axes=axes, root=root)


def _lost_rotation(moments: Moments, expected_rotation: bool) -> Tensor:
    """E|e^{i Delta theta} - c|^2 of the constant c that stands in for the rotation: its mean, or 1; [H,P]."""
    rho = moments.rotation
    return 1 - rho.abs().square() if expected_rotation else 2 - 2 * rho.real

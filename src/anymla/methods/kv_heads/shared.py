"""One head in the place of several: principal components of what they hold, weighted by what an error costs.

Shapes: n numbers of several heads, r kept, G KV heads in groups of t, N = G/t, d numbers of a head, P rope pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymla.methods.kv_heads.moments import HeadMoments

EVEN = 1e-9  # of a metric's mean, so that what costs nothing is kept apart still


@dataclass(frozen=True)
class Shared:
    """``encoder`` [..,r,n] makes the shared numbers of those of all heads, ``decoder`` [..,n,r] those of them again."""

    encoder: Tensor
    decoder: Tensor

    @classmethod
    def of(cls, gram: Tensor, metric: Tensor | None, rank: int) -> Shared:
        """The best of so many numbers (Eckart-Young), real or complex.

        Minimises E[e^H M e] over the errors e of numbers x with E[x x^H] = ``gram`` [..,n,n]; ``metric`` M [..,n,n];
        None: the identity.
        """
        metric = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) if metric is None else metric
        values, vectors = torch.linalg.eigh(metric)
        values = values.clamp_min(0) + EVEN * values.mean(-1, keepdim=True).clamp_min(1e-300)
        root = (vectors * values.sqrt().unsqueeze(-2)).mH  # M = root^H root
        inverse = vectors / values.sqrt().unsqueeze(-2)
        kept = torch.linalg.eigh(root @ gram @ root.mH).eigenvectors[..., -rank:].flip(-1)
        decoder = inverse @ kept
        size = decoder.abs().square().sum(-2, keepdim=True).sqrt()  # as orthonormal ones are
        return cls(kept.mH @ root * size.mT, decoder / size)


def grouped(moments: Tensor, group: int) -> Tensor:
    """Blocks [N,t d,t d] of groups of ``group`` adjacent heads on the diagonal of moments [G,d,G,d]."""
    heads, size = moments.shape[:2]
    blocks = moments.reshape(heads // group, group * size, heads // group, group * size)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)


def on_diagonal(blocks: Tensor, group: int) -> Tensor:
    """Matrices [N,t d,t d] with those of a group's heads, ``blocks`` [G,d,d], on their diagonals."""
    size = blocks.shape[-1]
    placed = torch.diag_embed(blocks.unflatten(0, (-1, group)).permute(0, 2, 3, 1))  # [N,d,d,t,t]
    return placed.permute(0, 3, 1, 4, 2).reshape(-1, group * size, group * size)


def shared_values(moments: HeadMoments, output: Tensor | None, group: int) -> Shared:
    """Values of each group, d numbers of t d: encoder [N,d,t d].

    ``output`` [D,G,d]: what reads the values of each head, which says what an error in them costs; None: all alike.
    """
    size = moments.value.shape[1]
    metric = None if output is None else grouped(torch.einsum("Dgd,Dhe->gdhe", output, output), group)
    return Shared.of(grouped(moments.value, group), metric, size)


def shared_keys(moments: HeadMoments, group: int, *, weighted: bool) -> Shared:
    """Keys of each group as they are in ``moments``, d numbers of t d: encoder [N,d,t d]."""
    size = moments.key.shape[1]
    weights = on_diagonal(moments.query, group) if weighted else None
    return Shared.of(grouped(moments.key, group), weights, size)


def shared_channels(moments: HeadMoments, pairs: int, group: int, *, weighted: bool) -> Shared:
    """Keys of each group before rope, mixed within one frequency only, which commutes with rope: encoder [N,d,t d].

    Complex principal components across the group's heads for each pair, t to 1, and real ones of the dims without
    rope, all of them together.
    """
    turned, rest = 2 * pairs, moments.key.shape[1] - 2 * pairs
    groups = len(moments.key) // group
    channels = Shared.of(complex_moments(moments.key, pairs, group), _energies(moments, pairs, group, weighted), 1)
    encoder = _real(channels.encoder[..., 0, :]).permute(0, 1, 4, 2, 3, 5)  # [N,2,P,t,2,P]
    decoder = _real(channels.decoder[..., 0]).permute(0, 2, 1, 4, 3, 5)  # [N,t,2,P,2,P]
    encoder = pad(encoder.reshape(groups, turned, group, turned), (0, rest, 0, 0, 0, rest))
    decoder = pad(decoder.reshape(groups, group, turned, turned), (0, rest, 0, rest))
    if rest:
        metric = on_diagonal(moments.query[:, turned:, turned:], group) if weighted else None
        left = Shared.of(grouped(moments.key[:, turned:, :, turned:], group), metric, rest)
        encoder[:, turned:, :, turned:] = left.encoder.unflatten(-1, (group, rest))
        decoder[:, :, turned:, turned:] = left.decoder.unflatten(1, (group, rest))
    return Shared(encoder.flatten(2), decoder.flatten(1, 2))


def complex_moments(moments: Tensor, pairs: int, group: int) -> Tensor:
    """E[z z^H] [N,P,t,t] of the rope pairs z of each group's heads, out of moments [G,d,G,d]."""
    blocks = grouped(moments[:, : 2 * pairs, :, : 2 * pairs], group)
    blocks = blocks.unflatten(2, (group, 2, pairs)).unflatten(1, (group, 2, pairs))
    (rr, ri), (ir, ii) = (row.unbind(3) for row in torch.diagonal(blocks, dim1=3, dim2=6).unbind(2))
    return torch.complex(rr + ii, ir - ri).permute(0, 3, 1, 2)


def _energies(moments: HeadMoments, pairs: int, group: int, weighted: bool) -> Tensor | None:
    """How much the queries of each head hold of a pair, on the diagonal of [N,P,t,t]."""
    if not weighted:
        return None
    squares = torch.diagonal(moments.query, dim1=-2, dim2=-1)[:, : 2 * pairs].unflatten(1, (2, pairs)).sum(1)
    return torch.diag_embed(squares.unflatten(0, (-1, group)).transpose(1, 2)).to(torch.complex128)


def _real(values: Tensor) -> Tensor:
    """The real matrices [N,2,t,2,P,P] that multiply pairs as the complex ``values`` [N,P,t] do."""
    rows = [torch.stack([values.real, -values.imag], -1), torch.stack([values.imag, values.real], -1)]
    return torch.diag_embed(torch.stack(rows, -2).permute(0, 3, 2, 4, 1))

"""The basis in which keys, or values, of a layer are coded (docs/mathematics.md, 'Coded caches').

Shapes: G key/value heads of d numbers, W = G d, P rope pairs of a head, K = G P channels. Vectors are rows; a head's
dims are [real parts of the rope pairs | imaginary parts | dims without rope]. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SHRINKAGE = 0.2  # of a Fisher matrix towards its diagonal: how dims go together differs between texts
FLOOR = 1e-6  # of its mean diagonal: what every direction costs at least
ANGLES = 64  # phases of a channel that are tried


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What states x [W] are, and what their errors cost: an error e costs e F e^T / 2 nats.

    Args:
        mean: E[x] [W].
        covariance: of x [W,W].
        fisher: F [W,W].
    """

    mean: Tensor
    covariance: Tensor
    fisher: Tensor

    def about_zero(self) -> Moments:
        """Those of states whose mean is not taken off."""
        gram = self.covariance + torch.outer(self.mean, self.mean)
        return Moments(mean=torch.zeros_like(self.mean), covariance=gram, fisher=self.fisher)

    def shrunk(self) -> Moments:
        """With a Fisher matrix that can be inverted."""
        diagonal = self.fisher.diagonal()
        floor = (diagonal.mean() * FLOOR).clamp_min(torch.finfo(torch.float64).tiny)
        fisher = (1 - SHRINKAGE) * self.fisher + torch.diag(SHRINKAGE * diagonal + floor)
        return Moments(mean=self.mean, covariance=self.covariance, fisher=fisher)

    def of(self, dims: Tensor) -> Moments:
        """Those of some dims alone."""
        return Moments(
            mean=self.mean[dims],
            covariance=self.covariance[dims][:, dims],
            fisher=self.fisher[dims][:, dims],
        )


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Coefficients z = (x - mean) encoder; x = z decoder + mean.

    Args:
        mean: [W].
        encoder, decoder: [W,W], each the other's inverse.
        energies: what each coefficient [W] costs where it is left out, in nats per token, twice: its variance times
            what its error costs.
        frequency: rope pair [W] with which each coefficient turns, -1 for none; None where they do not commute with
            rope. Channels come first in a block: their real parts, then their imaginary parts.
    """

    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    energies: Tensor
    frequency: Tensor | None = None

    def encode(self, states: Tensor) -> Tensor:
        """Coefficients of states [...,W]."""
        return (states.double() - self.mean) @ self.encoder

    def ordered(self, places: Tensor) -> Basis:
        """The same with coefficients in the order ``places`` [W]."""
        return Basis(
            mean=self.mean,
            encoder=self.encoder[:, places],
            decoder=self.decoder[places],
            energies=self.energies[places],
            frequency=None if self.frequency is None else self.frequency[places],
        )


def in_parts(moments: Moments, sizes: Sequence[int], basis: Callable[[Moments], Basis]) -> Basis:
    """The bases of parts of so many dims, each by itself, beside each other."""
    made = [basis(moments.of(dims)) for dims in torch.arange(len(moments.mean)).split([*sizes])]
    turned = [each.frequency for each in made if each.frequency is not None]
    return Basis(
        mean=moments.mean,
        encoder=torch.block_diag(*(each.encoder for each in made)),
        decoder=torch.block_diag(*(each.decoder for each in made)),
        energies=torch.cat([each.energies for each in made]),
        frequency=torch.cat(turned) if turned else None,
    )


def axes(moments: Moments) -> Basis:
    """Principal axes in the Fisher metric, by falling energy.

    With R = F^(1/2) and R C R = U L U^T, the encoder is R U, the Karhunen-Loeve transform of x R. Coefficients are
    uncorrelated, L is their energy, and errors of z cost their squares.
    """
    root, inverse = _roots(moments.fisher)
    axes = torch.linalg.eigh(root @ moments.covariance @ root)[1].flip(1)
    return _basis(moments, root @ axes, axes.T @ inverse)


def channels(moments: Moments, pairs: int, kv_heads: int) -> Basis:
    """Axes in the Fisher metric within each rope frequency: complex ones across heads, which commute with rope.

    F and C of a frequency's pairs are replaced by the parts that commute with rope, hermitian matrices [G,G]. Then
    every channel is rotated by the phase with the least product of its two parts' energies. Dims without rope have
    axes of their own. Coefficients are [real parts of the channels | imaginary parts | axes of the rest].
    """
    width = len(moments.mean)
    real, imag, rest = _places(pairs, width // kv_heads, kv_heads)
    encoder = torch.zeros_like(moments.covariance)
    decoder = torch.zeros_like(encoder)
    total = len(real)
    for pair in range(pairs):
        rows = torch.cat([part.view(pairs, kv_heads)[pair] for part in (real, imag)])
        columns = pair * kv_heads + torch.arange(kv_heads)
        columns = torch.cat([columns, columns + total])
        encode, decode = _complex_axes(moments.fisher[rows][:, rows], moments.covariance[rows][:, rows])
        encoder[rows[:, None], columns] = encode
        decoder[columns[:, None], rows] = decode
    if len(rest):
        columns = torch.arange(2 * total, width)
        own = axes(moments.of(rest))
        encoder[rest[:, None], columns], decoder[columns[:, None], rest] = own.encoder, own.decoder
    frequency = torch.arange(pairs).repeat_interleave(kv_heads).repeat(2)
    return _basis(moments, encoder, decoder, pad(frequency, (0, len(rest)), value=-1))


def single_channels(moments: Moments) -> Basis:
    """Rope channels [2K] as they are; ``frequency`` is then the number of each."""
    eye = torch.eye(len(moments.mean), dtype=moments.mean.dtype, device=moments.mean.device)
    energies = moments.covariance.diagonal() * moments.fisher.diagonal()
    return Basis(
        mean=moments.mean, encoder=eye, decoder=eye, energies=energies, frequency=torch.arange(len(eye) // 2).repeat(2)
    )


def _basis(moments: Moments, encoder: Tensor, decoder: Tensor, frequency: Tensor | None = None) -> Basis:
    """The basis, scaled such that the largest coefficient has variance 1: float16 has room for all."""
    variance = ((moments.covariance @ encoder) * encoder).sum(0).clamp_min(0)
    costs = ((decoder @ moments.fisher) * decoder).sum(1)
    scale = variance.max().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return Basis(
        mean=moments.mean,
        encoder=encoder / scale,
        decoder=decoder * scale,
        energies=variance * costs,
        frequency=frequency,
    )


def _complex_axes(fisher: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and decoder [2G,2G] of one frequency's pairs [real parts | imaginary parts]."""
    root, inverse = _roots(_commuting(fisher))
    axes = torch.linalg.eigh(root @ _commuting(covariance) @ root)[1].flip(1)
    encode = _real_form(axes.mH @ root).T  # a column z = V^H R x
    decode = _real_form(inverse @ axes).T
    turns = _phases((decode @ fisher) @ decode.T, encode.T @ covariance @ encode)
    return encode @ _real_form(torch.diag(turns)).T, _real_form(torch.diag(turns.conj())).T @ decode


def _phases(fisher: Tensor, covariance: Tensor) -> Tensor:
    """Factors [G] on the unit circle: turned by them, channels have parts whose energies' product is least."""
    heads = len(fisher) // 2
    angles = torch.arange(ANGLES, dtype=torch.float64, device=fisher.device) * (math.pi / 2 / ANGLES)
    turns = torch.polar(torch.ones_like(angles), angles)
    parts = []
    for matrix in (fisher, covariance):
        real, imag = (matrix.diagonal()[part] for part in (slice(heads), slice(heads, None)))
        mixed = matrix[:heads, heads:].diagonal()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first = cos**2 * real - 2 * sin * cos * mixed + sin**2 * imag
        parts.append(first * (real + imag - first))
    return turns[(parts[0] * parts[1]).argmin(0)]


def _commuting(matrix: Tensor) -> Tensor:
    """The part of a symmetric [2G,2G] that commutes with rope, as a hermitian matrix [G,G]."""
    real, imag = matrix.chunk(2)
    (rr, ri), (ir, ii) = real.chunk(2, 1), imag.chunk(2, 1)
    return torch.complex((rr + ii) / 2, (ir - ri) / 2)


def _real_form(matrix: Tensor) -> Tensor:
    """A complex matrix [G,G], which columns are multiplied with, on [real parts | imaginary parts]."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt().to(vectors.dtype)
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def _places(pairs: int, head_dim: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where real and imaginary parts [K], by frequency and then by head, and the other dims are among [W]."""
    heads = torch.arange(kv_heads) * head_dim
    real = (torch.arange(pairs)[:, None] + heads).flatten()
    rest = (heads[:, None] + torch.arange(2 * pairs, head_dim)).flatten()
    return real, real + pairs, rest

"""The low-rank latent: what a factorisation gets and gives (docs/mathematics.md, 'The latent').

Shapes: G kv heads, d head_dim, r latent rank. y = [k_rest ; v], 2Gd numbers: the keys less what rope channels carry,
and the values. A factorisation approximates y by mean + decoder @ encoder @ (y - mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anymla.architectures.attention import AttentionWeights
from anymla.methods.mla.channels import Channels
from anymla.methods.mla.moments import Moments

DAMPING = 1e-6  # share of the weights' own moments in the data's: directions that calibration never saw keep an order


@dataclass(frozen=True)
class LatentProblem:
    """The statistics of y, float64, each computed when a factorisation first asks for it.

    ``rotation`` [H,P] stands in for e^{i Delta theta} on the position-free part, where queries read k_rest.
    """

    weights: AttentionWeights
    moments: Moments
    channels: Channels
    rotation: Tensor

    @property
    def key_size(self) -> int:
        """Gd, the length of the key part of y."""
        return self.weights.key.shape[0] * self.weights.key.shape[1]

    @cached_property
    def bias(self) -> Tensor:
        """The constant part of y [2Gd] that the projections' biases make; with a key norm there is none for keys.

        Zero where constants do not cancel (``centred``), as is ``weighted_mean``: the latent then carries them.
        """
        key_bias = torch.zeros_like(self.weights.key_bias) if self.weights.key_norm else self.weights.key_bias
        if not self.weights.centred:
            return torch.zeros_like(torch.cat([key_bias, key_bias]).flatten())
        return self._rest(torch.cat([key_bias, self.weights.value_bias]).flatten())

    @cached_property
    def weight_gram(self) -> Tensor:
        """W W^T [2Gd,2Gd] of the projection that makes y; with a key norm, its gain scales the rows of W_k."""
        return self._rest_both(self._projection_gram)

    @cached_property
    def unbiased_gram(self) -> Tensor:
        """E[(y - bias)(y - bias)^T] = W E[x x^T] W^T."""
        bias = torch.outer(self.bias, self._rest(self.moments.mean))
        return self._damped(self.moments.gram) - bias - bias.T + torch.outer(self.bias, self.bias)

    @cached_property
    def gram(self) -> Tensor:
        """E[y y^T]."""
        return self._damped(self.moments.gram)

    @cached_property
    def weighted_gram(self) -> Tensor:
        """E[y y^T] with tokens weighted by the attention they receive."""
        return self._damped(self.moments.weighted_gram)

    @cached_property
    def weighted_mean(self) -> Tensor:
        """E[y] with the same weights."""
        mean = self._rest(self.moments.weighted_mean)
        return mean if self.weights.centred else torch.zeros_like(mean)

    @cached_property
    def metric(self) -> Tensor:
        """M as its blocks [2G,d,d], keys first: how much an error of a head's key or value damages the output."""
        kv_heads, d, _ = self.weights.key.shape
        real, imag = torch.diag_embed(self.rotation.real), torch.diag_embed(self.rotation.imag)
        pairs = self.weights.rope_pairs
        turn = torch.eye(d, dtype=real.dtype, device=real.device).repeat(len(real), 1, 1)
        turn[:, : 2 * pairs, : 2 * pairs] = torch.cat(
            [torch.cat([real, -imag], dim=2), torch.cat([imag, real], dim=2)], dim=1
        )
        turned = turn @ self.moments.query_gram @ turn.transpose(1, 2)  # E[q' q'^T] of q' = q * rotation, [H,d,d]
        keys = (self.moments.key_weight * self.weights.scaling**2)[:, None, None] * turned
        output_gram = torch.einsum("Dhd,Dhe->hde", self.weights.output, self.weights.output)
        values = self.moments.value_weight[:, None, None] * output_gram
        return torch.cat([blocks.view(kv_heads, -1, d, d).sum(1) for blocks in (keys, values)])

    @cached_property
    def _projection_gram(self) -> Tensor:
        key = self.weights.key * self.weights.key_gain[:, :, None]
        projection = torch.cat([key, self.weights.value]).flatten(0, 1)
        return projection @ projection.T

    @cached_property
    def _remainder(self) -> Tensor:
        return self.channels.remainder(self.weights.rope_pairs, self.weights.key.shape[1])

    def _rest(self, y: Tensor) -> Tensor:
        """Takes out of the key rows of ``y`` [2Gd, ...] what the channels carry."""
        return torch.cat([self._remainder @ y[: self.key_size], y[self.key_size :]])

    def _rest_both(self, gram: Tensor) -> Tensor:
        return self._rest(self._rest(gram).T).T

    def _damped(self, gram: Tensor) -> Tensor:
        share = DAMPING * gram.trace() / self._projection_gram.trace().clamp_min(1e-300)
        return self._rest_both(torch.add(gram, self._projection_gram, alpha=share.item()))


@dataclass(frozen=True)
class Latent:
    """encoder [r, 2Gd], decoder [2Gd, r], mean [2Gd]: y ~ mean + decoder @ encoder @ (y - mean)."""

    encoder: Tensor
    decoder: Tensor
    mean: Tensor


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors of a symmetric matrix, as columns, the largest first."""
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors  # reads one triangle, so rounding cannot unbalance it
    return vectors[:, len(matrix) - rank :].flip(1)


def blockwise(blocks: Tensor, matrix: Tensor) -> Tensor:
    """A block-diagonal matrix, given as its blocks [N,d,d], times ``matrix`` [N d, M]."""
    return torch.bmm(blocks, matrix.reshape(len(blocks), -1, matrix.shape[1])).flatten(0, 1)

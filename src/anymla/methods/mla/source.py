"""The original attention as a layout can hold it: without biases, beside an exact window, without norms.

Shapes: B windows, T tokens, D hidden, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from anymla.architectures.attention import SourceAttention, gain_of
from anymla.errors import UnsupportedModelError


def without_biases(source: SourceAttention) -> SourceAttention:
    """``source`` for a layout that has no biases: the latent carries its mean, no projection has a constant.

    Raises:
        UnsupportedModelError: the attention itself has biases.
    """
    w = source.weights
    if any(bias.any() for bias in (w.query_bias, w.key_bias, w.value_bias, w.output_bias)):
        raise UnsupportedModelError("its attention has biases, the target's layout none: give --target vllm")
    return replace(source, weights=replace(w, centred=False), biases=False)


def with_exact_window(source: SourceAttention, tokens: int) -> SourceAttention:
    """``source`` for a layer that keeps the keys and values of its last ``tokens`` beside the latent.

    If values are no linear map of x, the latent carries their mean, because exact ones cannot be centred.
    """
    centred = source.weights.centred and source.spec.linear_values
    return replace(source, weights=replace(source.weights, centred=centred), exact_window=tokens)


def with_static_norms(source: SourceAttention, inputs: Iterable[Tensor]) -> SourceAttention:
    """``source`` with weights that bring queries and keys nearest to the normalised ones, on ``inputs`` [B,T,D].

    A norm takes q to g q / rms(q). The scale s of a head that minimises E||g q / rms(q) - s g q||^2 is
    E[q' . g q] / E||g q||^2 of the normalised q'. It does not follow the size of single tokens: this is another model.
    """
    w = source.weights
    gains = gain_of(source.norms.get("q_norm"), w.query), w.key_gain
    scaled = [weight * gain[..., None] for weight, gain in zip((w.query, w.key), gains, strict=True)]
    biases = [bias * gain for bias, gain in zip((w.query_bias, w.key_bias), gains, strict=True)]
    products = [torch.zeros(2, len(weight), dtype=torch.float64, device=weight.device) for weight in scaled]
    for batch in inputs:
        normal = source.project(batch)
        for sums, weight, bias, true in zip(products, scaled, biases, normal, strict=False):  # no values
            plain = linear(batch.double(), weight.flatten(0, 1), bias.flatten()).unflatten(-1, weight.shape[:2])
            sums[0] += (plain * true.transpose(1, 2)).sum(dim=(0, 1, 3))
            sums[1] += plain.square().sum(dim=(0, 1, 3))
    query, key = (sums[0] / sums[1].clamp_min(1e-300) for sums in products)
    weights = replace(
        w,
        query=scaled[0] * query[:, None, None],
        key=scaled[1] * key[:, None, None],
        query_bias=biases[0] * query[:, None],
        key_bias=biases[1] * key[:, None],
        key_gain=torch.ones_like(w.key_gain),
        key_norm=False,
    )
    norms = {name: norm for name, norm in source.norms.items() if name not in ("q_norm", "k_norm")}
    lost = sum(tensor.numel() for name in ("q_norm", "k_norm") for tensor in source.norms[name].state_dict().values())
    spec = replace(source.spec, norms=None, norm_over="head", kept_numbers=source.spec.kept_numbers - lost)
    return replace(source, weights=weights, norms=norms, spec=spec)

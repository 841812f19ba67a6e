"""Levels of KVQuant (arXiv 2401.18079, sections 3.1 to 3.5) for one layer's keys and values.

Shapes: N tokens, n numbers of a token's keys or values, k = 2**bits levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.methods.cache_coding.build import build_coded
from anymla.methods.cache_coding.coded import Coded
from anymla.methods.cache_coding.energies import read
from anymla.methods.cache_coding.tables import TableSample
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import Coding
from anymla.modeling.rows_attention import RowsAttention

if TYPE_CHECKING:
    from anymla.methods.cache_coding.kvquant import KVQuant
    from anymla.sweep.layer import Layer

LEAST = 1e-3  # of the mean weight: what every number counts at least


def build_quantised(layer: Layer, settings: KVQuant) -> tuple[RowsAttention, float]:
    """The attention of a layer with tables fitted to what the survey found.

    Returns also what its codes cost on the survey's sample, in nats of KL per token, for small errors.
    """
    facts, spec = layer.choice.facts, layer.planned.coded
    if spec is None:
        raise ValueError(f"layer {layer.index} is not planned to be coded")
    sides, lost = {}, 0.0
    for kind, coding in (("key", spec.keys), ("value", spec.values)):
        tables = fitted_tables(facts, kind, coding, settings)
        sides[kind] = Coded(coding=coding, basis=None, tables=tables)
        lost += predicted_loss(facts, kind, coding, tables)
    return build_coded(layer, spec, sides["key"], sides["value"], read(facts["inv_freq"])), lost


def fitted_tables(facts: dict[str, Any], kind: str, coding: Coding, settings: KVQuant) -> dict[int, Tensor]:
    """Levels of a layer's "key" or "value", as a codec takes them; none where the codec has none."""
    if coding.kind != "table":
        return {}
    states, gradients = (read(facts[f"{kind}_{name}"]).double() for name in ("sample", "gradients"))
    by_token = coding.token_scale
    zero, scale = token_ranges(states, coding.outliers) if by_token else channel_ranges(states, settings.sparse)
    levels = shared_levels((states - zero) / scale, gradients.square(), coding.outliers, settings)
    return {settings.bits: levels.expand(coding.width, -1) if by_token else levels * scale.T + zero.T}


def predicted_loss(facts: dict[str, Any], kind: str, coding: Coding, tables: dict[int, Tensor]) -> float:
    """Nats of KL per token that the codes of "key" or "value" cost on the sample, for small errors."""
    states, gradients = (read(facts[f"{kind}_{name}"]) for name in ("sample", "gradients"))
    codec = make_codec(coding)
    codec.set_tables(tables)
    error: Tensor = codec(states) - states
    lost: float = (error.double() * gradients.double()).sum(-1).square().mean().item() / 2
    return lost


def channel_ranges(states: Tensor, sparse: float) -> tuple[Tensor, Tensor]:
    """Middle and half width [1,n] of every channel's range, which leaves out the share ``sparse`` of all tokens."""
    ends = torch.tensor([sparse / 2, 1 - sparse / 2], dtype=states.dtype, device=states.device)
    return _middle(*states.quantile(ends, dim=0)[:, None])


def token_ranges(states: Tensor, outliers: int) -> tuple[Tensor, Tensor]:
    """Middle and half width [N,1] of every token's range, without its largest and smallest ``outliers`` numbers."""
    ordered, below = states.sort(dim=-1).values, outliers // 2
    return _middle(ordered[:, below, None], ordered[:, states.shape[1] - 1 - (outliers - below), None])


def _middle(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return (high + low) / 2, ((high - low) / 2).clamp_min(1e-12)


def shared_levels(numbers: Tensor, weights: Tensor, outliers: int, settings: KVQuant) -> Tensor:
    """One table [k] for all ``numbers`` [N,n], in units of their ranges, but the ``outliers`` largest of each token.

    ``weights`` [N,n]: their Fisher information.
    """
    sizes = numbers.abs()
    dense = sizes <= sizes.topk(outliers + 1).values[:, -1:]
    weights = (weights + LEAST * weights.mean() + 1e-300) * dense
    levels = TableSample(numbers.reshape(-1, 1), weights.reshape(-1, 1)).fit(settings.bits)[0]
    return _with_moments_of(numbers[dense], levels) if settings.moves_levels else levels


def _with_moments_of(numbers: Tensor, levels: Tensor) -> Tensor:
    """Q-Norm: ``levels`` moved such that what is read has the mean and deviation of ``numbers``."""
    read = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)]
    ratio = numbers.std() / read.std().clamp_min(1e-12)
    return levels * ratio + (numbers.mean() - read.mean() * ratio)

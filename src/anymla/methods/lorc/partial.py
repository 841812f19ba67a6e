"""LoRC with partial rope: some pairs of every head stay turned, one SVD each takes the other keys and the values.

Shapes: H query heads, G key/value heads of d numbers, P rope pairs of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anymla.architectures.attention import AttentionWeights
from anymla.methods.lorc.weights import Heard
from anymla.methods.mla.factorization.split_svd import SplitSVD
from anymla.methods.mla.moments import Moments
from anymla.methods.mla.rank_survey import source_of
from anymla.methods.mla.rope.uniform import Uniform
from anymla.methods.mla.sample import Sample
from anymla.methods.mla.weights import build_attention, convert_layer
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.latent_spec import LatentSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


def build_partial(layer: Layer, latent: LatentSpec, heard: Heard) -> LatentAttention:
    """The latent attention of a layer as planned, with rope pairs evenly spaced over the frequencies."""
    source = source_of(layer)
    converted = convert_layer(
        source.weights,
        nothing_measured(source.weights, heard.scale),
        Uniform(),
        SplitSVD(),
        rope_dims=latent.qk_rope_head_dim,
        kv_rank=latent.kv_lora_rank,
        expected_rotation=False,
    )
    return build_attention(layer.attention, source, converted, layer.config, layer.saved)


def nothing_measured(weights: AttentionWeights, scale: float) -> Moments:
    """Moments of no text at all, for choices that look at the weights; ``scale``: what rope multiplies a pair with."""
    heads, pairs = len(weights.query), weights.rope_pairs
    none = weights.key.new_zeros(0)
    turn = torch.ones(heads, pairs, dtype=torch.complex128, device=none.device)
    return Moments(
        **dict.fromkeys(("gram", "mean", "weighted_gram", "weighted_mean", "query_gram"), none),
        **dict.fromkeys(("key_weight", "value_weight", "query_norm"), none),
        rotation=turn,
        rope_scale=scale**2,  # of queries and keys
        key_norm=none.new_zeros(len(weights.key), pairs),
        sample=Sample(query=none, key=none, turn=turn, allowed=none),
    )

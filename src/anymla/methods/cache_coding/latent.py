"""One layer with latent attention whose cache is then coded: tables put into its codecs.

Shapes: r latent rank, R rope dims, P rope pairs.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.methods.cache_coding.coded import Coded, codec_tensors
from anymla.modeling.coded_latent import CodedLatentAttention
from anymla.modeling.coding_spec import CodedSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


def build_coded_latent(
    layer: Layer, spec: CodedSpec, latent: Coded, rope_key: Coded, inv_freq: Tensor
) -> CodedLatentAttention:
    """The attention of a layer with its latent and its rope key in codes; ``inv_freq`` [P]: as of build_coded."""
    made, found = replace(layer.old, coded=spec, attention_bytes=None), copy.deepcopy(layer.attention)
    found.__class__ = CodedLatentAttention
    found.layer_spec = made
    found.make_codes(made)
    device = next(found.parameters()).device
    tensors = codec_tensors(latent, rope_key) | {"inv_freq": inv_freq.float().view(torch.int32)}
    found.load_state_dict(found.state_dict() | {name: each.to(device) for name, each in tensors.items()}, assign=True)
    return found.eval().requires_grad_(False)

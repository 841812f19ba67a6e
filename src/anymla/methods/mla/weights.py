"""One layer from grouped-query to latent attention: tensors in, tensors out (docs/mathematics.md).

Shapes: D hidden, H query heads, G kv heads, n = H/G, d head_dim, P rope pairs, K channels, R = 2K, r latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.attention import AttentionWeights, SourceAttention
from anymla.methods.mla.channels import Channels, no_channels
from anymla.methods.mla.factorization import Factorization
from anymla.methods.mla.latent import Latent, LatentProblem
from anymla.methods.mla.moments import Moments
from anymla.methods.mla.rope import RopeChoice
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """Channels, latent and expected rotation of one layer; all that its new weights are made of."""

    channels: Channels
    latent: Latent
    rotation: Tensor  # [H,P] complex: what stands in for e^{i Delta theta} on the position-free part


def convert_layer(
    weights: AttentionWeights,
    moments: Moments,
    rope: RopeChoice,
    factorization: Factorization,
    *,
    rope_dims: int,
    kv_rank: int,
    expected_rotation: bool,
) -> ConvertedLayer:
    """Chooses channels, then the latent of what they leave; float64 throughout."""
    problem = latent_problem(weights, moments, rope, rope_dims=rope_dims, expected_rotation=expected_rotation)
    latent = factorization(problem, kv_rank)
    return ConvertedLayer(channels=problem.channels, latent=latent, rotation=problem.rotation)


def latent_problem(
    weights: AttentionWeights, moments: Moments, rope: RopeChoice, *, rope_dims: int, expected_rotation: bool
) -> LatentProblem:
    """Chooses channels, and says what they leave to the latent."""
    channels = rope(moments, rope_dims, expected_rotation=expected_rotation) if rope_dims else no_channels(moments)
    rotation = moments.rotation if expected_rotation else torch.ones_like(moments.rotation)
    rotation = rotation * moments.rope_scale
    if weights.query_gain is not None:  # on a pair without its rotation: the mean of its two gains
        rotation = rotation * weights.query_gain[: 2 * weights.rope_pairs].view(2, -1).mean(0)
    return LatentProblem(weights, moments, channels, rotation)


def latent_tensors(source: SourceAttention, layer: ConvertedLayer) -> dict[str, Tensor]:
    """The tensors of LatentAttention, float64."""
    weights, channels, latent = source.weights, layer.channels, layer.latent
    kv_heads, d, _ = weights.key.shape
    size, pairs = kv_heads * d, weights.rope_pairs
    encoder = latent.encoder.clone()  # from y to the latent; now from the true [k ; v]
    encoder[:, :size] = latent.encoder[:, :size] @ channels.remainder(pairs, d)
    key_rows = torch.cat([encoder[:, :size], channels.encoder(pairs, d)])  # [r+R, Gd]
    decoder = latent.decoder.view(2, kv_heads, d, -1).transpose(0, 1)  # per kv head: key rows, then value rows
    value_mean = latent.mean[size:].view(kv_heads, d)
    mean_output = torch.einsum(
        "Dhd,hd->D", weights.output, value_mean.repeat_interleave(len(weights.query) // kv_heads, 0)
    )
    weight = channels.decode.conj().T  # [G,K]
    encoders = _encoders(source, key_rows, encoder[:, size:], latent.encoder, latent.mean)
    tensors: dict[str, Tensor | None] = {
        **encoders,
        "q_proj.weight": weights.query.flatten(0, 1),
        "q_proj.bias": weights.query_bias.flatten(),
        "kv_b_proj.weight": decoder.reshape(2 * size, -1),
        "o_proj.weight": weights.output.flatten(1),
        "o_proj.bias": weights.output_bias + mean_output,
        "query_rotation": torch.stack([layer.rotation.real, layer.rotation.imag]),
        "channel_weight": torch.stack([weight.real, weight.imag]),
        "channel_index": channels.index.to(weights.query.device),
        "gate_proj.weight": weights.gate,
        "gate_proj.bias": weights.gate_bias,
        "sinks": weights.sinks,
        "query_gain": weights.query_gain,
    }
    if source.exact_window:
        tensors["key_mean"] = latent.mean[:size].view(kv_heads, d)
    if not source.biases:
        tensors |= dict.fromkeys(("q_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"))
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _encoders(
    source: SourceAttention, key_rows: Tensor, value_rows: Tensor, encoder: Tensor, mean: Tensor
) -> dict[str, Tensor]:
    """What makes latent and channels of x: one matrix, or, where projections and cache are not linear, several.

    ``encoder`` [r,2Gd] is the latent's, ``mean`` [2Gd] what it is centred at. With an exact window also what makes true
    keys and, centred, values.
    """
    weights, rank = source.weights, len(value_rows)
    key, value = weights.key.flatten(0, 1), weights.value.flatten(0, 1)
    value_bias, offset, windowed = weights.value_bias.flatten(), encoder @ mean, source.exact_window > 0
    shift = mean[len(key) :] if windowed else torch.zeros_like(value_bias)
    true_keys = {"k_proj.weight": key, "k_proj.bias": weights.key_bias.flatten()}
    true_values = {"v_proj.weight": value, "v_proj.bias": value_bias - shift}
    from_x, bias = value_rows @ value, value_rows @ value_bias - offset
    if not weights.key_norm:
        weight, bias_row = key_rows @ key, key_rows @ weights.key_bias.flatten()
        weight[:rank] += from_x
        bias_row[:rank] += bias
        tensors = {"kv_a_proj_with_mqa.weight": weight, "kv_a_proj_with_mqa.bias": bias_row}
        return tensors | true_keys | true_values if windowed else tensors
    tensors = true_keys | {"k_a_proj_with_mqa.weight": key_rows}
    if source.spec.linear_values and not windowed:
        return tensors | {"v_a_proj.weight": from_x, "v_a_proj.bias": bias}
    return tensors | true_values | {"v_a_proj.weight": value_rows, "v_a_proj.bias": value_rows @ shift - offset}


def build_attention(
    original: Any, source: SourceAttention, layer: ConvertedLayer, config: Any, saved: torch.dtype
) -> LatentAttention:
    """A LatentAttention in the original's dtype and device, float64 being rounded to what is ``saved`` here, once."""
    like = next(original.parameters())
    spec = LayerSpec(
        attention=source.spec,
        latent=LatentSpec(
            kv_lora_rank=len(layer.latent.encoder),
            qk_rope_head_dim=2 * len(layer.channels),
            channel_fold=layer.channels.fold,
            biases=source.biases,
            exact_window=source.exact_window,
        ),
        shared=source.shared,
    )
    with torch.device("meta"):
        attention: LatentAttention = attention_class(spec)(original, config, spec)
    cast = {
        name: (tensor.to(saved).to(like.dtype) if tensor.is_floating_point() else tensor).to(like.device).contiguous()
        for name, tensor in latent_tensors(source, layer).items()
    }
    norms = {
        f"{name}.{key}": tensor for name, norm in source.norms.items() for key, tensor in norm.state_dict().items()
    }
    attention.load_state_dict(cast | norms, assign=True)
    return attention.eval().requires_grad_(False)

"""A layer that attends by another layer's attention map, with a latent of its values alone.

Shapes: D hidden, H query heads, G key/value heads of d numbers, n = G d, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymla.architectures.attention import is_centred
from anymla.architectures.parts import linear_weights
from anymla.distributed import all_sum, all_sum_number
from anymla.methods.base import Changed
from anymla.methods.mla.choose import LayerResult
from anymla.methods.mla.factorization.output_aware import OutputAware
from anymla.methods.mla.latent import DAMPING, blockwise, top_eigenvectors
from anymla.methods.mla.observe import TargetObserver
from anymla.methods.mla.refit import OutputBatch, refit_output
from anymla.model_run.activations import Activations
from anymla.model_run.maps import WindowMaps
from anymla.model_run.stream import LayerBatch
from anymla.modeling.attention import joined
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.shared_attention import MAPS, SharedAttention
from anymla.modeling.shared_latent import SharedLatentAttention

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class ValueObserver(TargetObserver):
    """Moments of a shared layer's values [n], and targets.

    Raises:
        ValueError: the layer attends by no other layer's map.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if not isinstance(shared := layer.attention, SharedAttention):
            raise ValueError(f"layer {layer.index} attends by a map of its own")
        self.shared: SharedAttention = shared
        weight, self.value_bias = linear_weights(shared.v_proj)
        self.value_weight, self.tokens = weight, weight.new_zeros(())
        self.sum, self.gram = weight.new_zeros(len(weight)), weight.new_zeros(len(weight), len(weight))

    def add(self, batch: LayerBatch) -> None:
        """Takes one batch of the original's stream."""
        run = self.run_of(batch)
        if len(fitted := self.fitted(batch, run)):
            values = joined(self.shared.true_value(fitted)).flatten(0, 1).double()
            self.tokens += len(values)
            self.sum += values.sum(0)
            self.gram += values.T @ values

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [n], and second moments [n,n], in which directions that no text has keep an order."""
        tokens = all_sum(self.tokens)
        mean, gram = all_sum(self.sum) / tokens, all_sum(self.gram) / tokens
        self.check_finite(gram)
        of_weights = self.value_weight @ self.value_weight.T
        return mean, gram + of_weights * (DAMPING * gram.trace() / of_weights.trace().clamp_min(1e-300))


def fit_values(layer: Layer, observed: ValueObserver) -> Changed:
    """Puts a latent of the values in the place of a shared layer's values, and refits the output.

    The latent loses least of the output, as ``output-aware`` does, with all tokens alike. It takes no gradient steps.
    """
    attention = _build(layer, observed)
    inputs = observed.converted_inputs()

    def batches(windows: slice) -> Iterator[OutputBatch]:
        seen: list[Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            for start in range(windows.start, windows.stop, layer.batch):
                part = slice(start, min(start + layer.batch, windows.stop))
                maps = WindowMaps(layer.converted, part, attention)
                output, _ = attention(inputs[part], **observed.arguments | {MAPS: maps})
                yield OutputBatch(seen.pop(), observed.target[part] - output)
        finally:
            hook.remove()

    lost = refit_output(attention, batches, layer.windows.fit, layer.windows.choice, layer.saved)
    power = max(all_sum_number(float(observed.power), observed.gram.device), 1e-300)
    layer.module.set_submodule(layer.attention_path, attention)
    _close(inputs, observed.target)
    rank = attention.v_b_proj.in_features
    result = LayerResult(layer=layer.index, rope_dims=0, kv_rank=rank, error=lost / power)
    return Changed(spec=attention.layer_spec, result=asdict(result))


def _build(layer: Layer, observed: ValueObserver) -> SharedLatentAttention:
    """The attention as planned, in the original's dtype and device, rounded to what is saved once."""
    _, latent = layer.planned.parts
    made = replace(layer.old, latent=replace(latent, qk_rope_head_dim=0), attention_bytes=None)
    with torch.device("meta"):
        attention: SharedLatentAttention = attention_class(made)(layer.attention, layer.config, made)
    like = next(layer.attention.parameters())
    kept = ("o_proj.", "gate_proj.", "v_norm.", "output_norm.")
    old = {name: tensor for name, tensor in layer.attention.state_dict().items() if name.startswith(kept)}
    new = _tensors(observed, latent, made.makes_values)
    cast = old | {name: tensor.to(layer.saved).to(like.dtype) for name, tensor in new.items()}
    attention.load_state_dict({name: each.to(like.device).contiguous() for name, each in cast.items()}, assign=True)
    return attention.eval().requires_grad_(False)


def _tensors(observed: ValueObserver, latent: LatentSpec, makes_values: bool) -> dict[str, Tensor]:
    """What makes the latent, what reads it, and the output's bias, which takes the mean of values; float64."""
    shared, weight, bias = observed.shared, observed.value_weight, observed.value_bias
    output, output_bias = linear_weights(shared.o_proj)
    by_head = output.unflatten(1, (shared.num_heads, -1))  # [D,H,d]
    mean, gram = observed.moments()
    mean = mean if is_centred(shared.spec) else torch.zeros_like(mean)
    encoder, decoder = _latent(by_head, gram - torch.outer(mean, mean), shared.num_kv_heads, latent.kv_lora_rank)
    heads = mean.view(shared.num_kv_heads, -1).repeat_interleave(shared.num_key_value_groups, dim=0)
    tensors = {
        "v_b_proj.weight": decoder,
        "o_proj.bias": output_bias + torch.einsum("Dhd,hd->D", by_head, heads),
    }
    if makes_values:
        tensors |= {"v_proj.weight": weight, "v_proj.bias": bias}
        return tensors | {"v_a_proj.weight": encoder, "v_a_proj.bias": -encoder @ mean}
    return tensors | {"v_a_proj.weight": encoder @ weight, "v_a_proj.bias": encoder @ (bias - mean)}


def _latent(output: Tensor, covariance: Tensor, kv_heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """Encoder [r,n] and decoder [n,r] of the axes that the output [D,H,d] needs most."""
    metric = torch.einsum("Dhd,Dhe->hde", output, output).unflatten(0, (kv_heads, -1)).sum(1)
    root, inverse = OutputAware().roots(metric)
    vectors = top_eigenvectors(blockwise(root, blockwise(root, covariance).T), rank)
    encoder, decoder = blockwise(root, vectors).T, blockwise(inverse, vectors)
    size = encoder.norm(dim=1)
    return encoder / size[:, None], decoder * size


def _close(*rooms: Activations) -> None:
    for room in rooms:
        room.close()

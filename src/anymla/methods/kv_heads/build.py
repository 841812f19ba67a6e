"""An attention with fewer KV heads out of one layer's own: a stock one, or one that shares keys after rope.

Shapes: D hidden, H query heads, G KV heads in N groups of t, n = H/G, d numbers of a head. Rows [..,D+1] end with the
bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.architectures.attention import SourceAttention, pair_order, read_attention
from anymla.architectures.names import FUSED, OUTPUTS, SEPARATE
from anymla.architectures.parts import stored_projections
from anymla.errors import UnsupportedModelError
from anymla.methods.base import Changed
from anymla.methods.kv_heads.grouping import alike_as_neighbours
from anymla.methods.kv_heads.moments import HeadMoments, HeadSums, weight_moments
from anymla.methods.kv_heads.shared import Shared, shared_channels, shared_keys, shared_values
from anymla.modeling.grouped_attention import GroupedAttention
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.methods.kv_heads.settings import KVHeads
    from anymla.sweep.layer import Layer


@dataclass(frozen=True)
class Projections:
    """Rows of queries [G,n,d,D+1], keys and values [N or G,d,D+1], and the output's weight [D,G,n,d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @classmethod
    def of(cls, source: SourceAttention, order: list[int]) -> Projections:
        """Those of an attention, its KV heads and their query heads in this order."""
        w = source.weights
        query, key, value = (
            torch.cat([weight, bias[..., None]], -1)
            for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
        )
        groups = (len(key), -1)
        return cls(query.unflatten(0, groups)[order], key[order], value[order], w.output.unflatten(1, groups)[:, order])

    def with_keys(self, shared: Shared) -> Projections:
        """Keys shared before rope, queries that read them."""
        key = shared.encoder @ self.key.reshape(len(shared.encoder), -1, self.key.shape[-1])
        return replace(self, key=key, query=torch.einsum("gde,gndx->gnex", self._decoders(shared), self.query))

    def with_values(self, shared: Shared) -> Projections:
        """Values shared, an output projection that reads them."""
        value = shared.encoder @ self.value.reshape(len(shared.encoder), -1, self.value.shape[-1])
        return replace(self, value=value, output=torch.einsum("gde,Dgnd->Dgne", self._decoders(shared), self.output))

    def averaged(self, kept: int) -> Projections:
        """Means of the keys and values of each group, nothing else."""
        key, value = (rows.unflatten(0, (kept, -1)).mean(1) for rows in (self.key, self.value))
        return replace(self, key=key, value=value)

    def _decoders(self, shared: Shared) -> Tensor:
        """What brings each head's own back of what is shared [G,d,d]."""
        return shared.decoder.reshape(self.query.shape[0], self.query.shape[2], -1)


def share(layer: Layer, method: KVHeads, observed: Any) -> Changed:
    """Replaces the layer's attention by one with as many KV heads as ``layer.choice`` says.

    Raises:
        UnsupportedModelError: something not linear stands between x and the values.
    """
    if (old := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    original, kept = layer.attention, layer.choice
    source = read_attention(original, old, layer.family, layer.config)
    if not source.spec.linear_values or source.spec.gate or source.spec.output_norm is not None:
        raise UnsupportedModelError(
            f"layer {layer.index}: a norm, clip or gate comes between its values and its output projection"
        )
    moments = observed.moments() if isinstance(observed, HeadSums) else weight_moments(source)
    group, pairs = old.num_kv_heads // kept, 0 if method.variant == "post" else old.rope_pairs
    order = alike_as_neighbours(moments, pairs, group) if method.grouping == "overlap" else [*range(old.num_kv_heads)]
    projections, keys = _shared(Projections.of(source, order), moments.ordered(order), method, pairs, kept)
    spec = layer.planned
    if layer.planned.grouped is None:
        attention = stock_attention(layer, source, projections)
    else:
        spec = LayerSpec(
            attention=source.spec, grouped=layer.planned.grouped, module=f"{layer.name}.{layer.attention_path}"
        )
        attention = grouped_attention(layer, source, projections, keys, spec)
    layer.module.set_submodule(layer.attention_path, attention)
    return Changed(spec=spec, result={"layer": layer.index, "kv_heads": kept, "order": order})


def _shared(
    projections: Projections, moments: HeadMoments, method: KVHeads, pairs: int, kept: int
) -> tuple[Projections, Shared | None]:
    """The projections of the new attention, and what shares keys after rope where they are shared there."""
    if method.variant == "mean":
        return projections.averaged(kept), None
    weighted, group = method.weighting == "energy", len(moments.key) // kept
    output = projections.output.sum(2) if weighted else None  # [D,G,d]: as if the heads attended alike
    projections = projections.with_values(shared_values(moments, output, group))
    if method.variant == "freq":
        return projections.with_keys(shared_channels(moments, pairs, group, weighted=weighted)), None
    return projections, shared_keys(moments, group, weighted=weighted) if method.variant == "post" else None


def stock_attention(layer: Layer, source: SourceAttention, made: Projections) -> nn.Module:
    """The family's own attention, made by transformers of the new config."""
    original: Any = layer.attention
    with torch.device("meta"):
        attention: nn.Module = type(original)(layer.new_config, layer.index)
    places = pair_order(source.spec, layer.family).argsort()  # from anymla's order of a head's dims to the family's
    query, key = made.query.flatten(0, 1)[:, places], made.key[:, places]
    rows = (query.flatten(0, 1), key.flatten(0, 1), made.value.flatten(0, 1))
    output = next(name for name in OUTPUTS if hasattr(original, name))
    changed = stored_projections(original, *rows) | {f"{output}.weight": made.output.flatten(1)}
    kept = {
        name: tensor
        for name, tensor in original.state_dict().items()
        if name.partition(".")[0] not in (*SEPARATE, *FUSED) and name not in changed
    }
    _fill(attention, layer, changed | kept)
    return attention


def grouped_attention(
    layer: Layer, source: SourceAttention, made: Projections, keys: Shared | None, spec: LayerSpec
) -> GroupedAttention:
    """An attention whose cache has fewer heads than its keys before rope."""
    with torch.device("meta"):
        attention: GroupedAttention = attention_class(spec)(layer.attention, layer.config, spec)
    w, tensors = source.weights, dict[str, Tensor | None]()
    for name, rows in (("q_proj", made.query.flatten(0, 1)), ("k_proj", made.key), ("v_proj", made.value)):
        rows = rows.flatten(0, 1)
        tensors |= {f"{name}.weight": rows[:, :-1], f"{name}.bias": rows[:, -1]}
    tensors |= {"o_proj.weight": made.output.flatten(1), "o_proj.bias": w.output_bias}
    tensors |= {"sinks": w.sinks, "query_gain": w.query_gain}
    if keys is not None:
        tensors |= {"key_encoder": keys.encoder, "key_decoder": keys.decoder.reshape(*w.key.shape[:2], -1)}
    for part, norm in source.norms.items():
        tensors |= {f"{part}.{name}": tensor for name, tensor in norm.state_dict().items()}
    _fill(attention, layer, {name: each for name, each in tensors.items() if each is not None})
    return attention


def _fill(attention: nn.Module, layer: Layer, tensors: dict[str, Tensor]) -> None:
    """Gives ``attention`` the ``tensors``, rounded once to what is saved."""
    like = next(layer.attention.parameters())
    ready = {name: each.to(layer.saved).to(like.device, like.dtype).contiguous() for name, each in tensors.items()}
    attention.load_state_dict(ready, assign=True)
    attention.eval().requires_grad_(False)

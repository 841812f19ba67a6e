"""A layer without the structures that were found to matter least: the same numbers, in smaller tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.methods.saap.structures import Member, members
from anymla.modeling.modeling_anymla import attention_class

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


def shrink(layer: Layer, gone: dict[str, list[int]]) -> None:
    """Takes the structures ``gone``, by kind, out of ``layer.module``."""
    owned = {kind: members(kind, layer) for kind in gone}
    if any(kind != "neurons" and found for kind, found in owned.items()):
        _replace_attention(layer, owned, gone)
    for member in owned.get("neurons", ()):
        _shrink_linear(layer.module, member, gone["neurons"])


def _shrink_linear(module: nn.Module, member: Member, gone: list[int]) -> None:
    """Puts a smaller tensor in the place of one of a linear module's."""
    path, _, name = member.name.rpartition(".")
    linear: Any = module.get_submodule(path)
    smaller = member.without(getattr(linear, name), gone)
    setattr(linear, name, nn.Parameter(smaller, requires_grad=False))
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = linear.weight.shape
    else:
        linear.nx, linear.nf = linear.weight.shape


def _replace_attention(layer: Layer, owned: dict[str, tuple[Member, ...]], gone: dict[str, list[int]]) -> None:
    """Puts an attention with fewer heads or latent channels in the place of the layer's own."""
    original: Any = layer.attention
    with torch.device("meta"):
        attention: nn.Module = (
            type(original)(layer.new_config, layer.index)
            if layer.planned.kind is None
            else attention_class(layer.planned)(original, layer.new_config, layer.planned)
        )
    tensors: dict[str, Tensor] = {
        f"{layer.attention_path}.{name}": each for name, each in original.state_dict().items()
    }
    for kind in ("heads", "latent"):
        for member in owned.get(kind, ()):
            tensors[member.name] = member.without(tensors[member.name], gone[kind])
    prefix = f"{layer.attention_path}."
    made = {name.removeprefix(prefix): each.contiguous() for name, each in tensors.items()}
    attention.load_state_dict(made, assign=True)
    layer.module.set_submodule(layer.attention_path, attention.eval().requires_grad_(False))

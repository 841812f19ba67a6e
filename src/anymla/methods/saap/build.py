"""A layer without the structures that were found to matter least: the same numbers, in smaller tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.methods.saap.structures import Member, members, mixture
from anymla.modeling.modeling_anymla import attention_class

if TYPE_CHECKING:
    from anymla.modeling.spec import LayerSpec
    from anymla.sweep.layer import Layer


def shrink(layer: Layer, narrow: LayerSpec, gone: dict[str, list[int]]) -> list[str]:
    """Takes the structures ``gone``, by kind, out of ``layer.module``, which becomes ``narrow``; gives their kinds."""
    owned = {kind: found for kind in gone if (found := members(kind, layer))}
    if {"heads", "latent"} & owned.keys():
        _replace_attention(layer, narrow, owned, gone)
    for kind in owned.keys() - {"heads", "latent"}:
        for member in owned[kind]:
            _put_smaller(layer.module, member, gone[kind])
    if "experts" in owned:
        _count_experts(layer.module.get_submodule(str(mixture(layer.module))), len(gone["experts"]))
    return [*owned]


def _put_smaller(module: nn.Module, member: Member, gone: list[int]) -> None:
    """Puts a smaller tensor in the place of one of the layer's."""
    path, _, name = member.name.rpartition(".")
    part: Any = module.get_submodule(path)
    smaller = member.without(getattr(part, name), gone)
    setattr(part, name, nn.Parameter(smaller, requires_grad=False) if name in part._parameters else smaller)
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif type(part).__name__ == "Conv1D":
        part.nx, part.nf = part.weight.shape


def _count_experts(experts: nn.Module, fewer: int) -> None:
    """Lets a mixture's own modules know that they are ``fewer``."""
    for name, part in experts.named_modules():
        if "shared" not in name and isinstance(getattr(part, "num_experts", None), int):
            part.num_experts = int(part.num_experts) - fewer


def _replace_attention(
    layer: Layer, narrow: LayerSpec, owned: dict[str, tuple[Member, ...]], gone: dict[str, list[int]]
) -> None:
    """Puts an attention with fewer heads or latent channels in the place of the layer's own."""
    original: Any = layer.attention
    config = layer.new_config if narrow.width is None else narrow.width.config_of(layer.new_config)
    with torch.device("meta"):
        attention: nn.Module = (
            type(original)(config, layer.index)
            if narrow.kind is None
            else attention_class(narrow)(original, config, narrow)
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

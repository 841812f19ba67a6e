"""What of a layer goes together: the rows and columns of its tensors that a neuron, KV group or latent channel owns.

Shapes: D hidden, I neurons, H query heads in G KV groups, d numbers of a head, r latent rank, n structures of a kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymla.architectures.feed_forward import feed_forward
from anymla.architectures.names import FUSED, OUTPUTS, SEPARATE
from anymla.architectures.parts import GATES, NORMS, SINKS
from anymla.errors import UnsupportedModelError
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

LATENT = ("kv_a_proj_with_mqa", "k_a_proj_with_mqa", "v_a_proj")  # what makes the latent, as its first rows
ROTATIONS = ("query_rotation", "channel_weight")  # buffers of a latent attention, a head on their second dim
_NORMS = {name for pair in NORMS for name in pair}


@dataclass(frozen=True)
class Member:
    """The part of a tensor that structures own: ``places`` [n, vectors of each] along its dim ``dim``.

    ``name``: of the tensor in the layer. ``scored``: whether it is a matrix whose numbers tell importance.
    """

    name: str
    dim: int
    places: Tensor
    scored: bool = True

    def without(self, tensor: Tensor, gone: list[int]) -> Tensor:
        """``tensor`` without what the structures ``gone`` own."""
        kept = torch.ones(tensor.shape[self.dim], dtype=torch.bool)
        kept[self.places[gone].flatten()] = False
        return tensor.index_select(self.dim, kept.nonzero().flatten().to(tensor.device))

    def sums(self, numbers: Tensor) -> Tensor:
        """Sums [n, vectors of each] of ``numbers``, shaped as the tensor is, over each vector."""
        over = [dim for dim in range(numbers.dim()) if dim != self.dim]
        vectors = numbers.sum(over) if over else numbers
        return vectors[self.places.to(numbers.device)]


def members(kind: str, layer: Layer) -> tuple[Member, ...]:
    """What the structures of ``kind`` own in a layer; nothing, where it has none of them.

    Raises:
        UnsupportedModelError: a tensor of which nobody knows to which structure it belongs.
    """
    if kind == "neurons":
        return tuple(_of_neurons(layer.module))
    if kind == "experts":
        return tuple(_of_experts(layer.module))
    if layer.old.attention is None:
        return ()
    own = layer.attention.state_dict()
    found = _of_latent(own, layer.old) if kind == "latent" else _of_groups(own, layer)
    return tuple(Member(f"{layer.attention_path}.{each.name}", each.dim, each.places, each.scored) for each in found)


def _of_neurons(module: nn.Module) -> Iterable[Member]:
    network = feed_forward(module)
    neurons = network.neurons
    for name in (*network.ups, network.down):
        linear: Any = module.get_submodule(name)
        turned, column = not isinstance(linear, nn.Linear), name == network.down
        dim = int(column != turned)
        rows = linear.weight.shape[dim] // neurons  # two, where gate and up are one matrix
        places = torch.arange(rows * neurons).view(rows, neurons).T
        yield Member(f"{name}.weight", dim, places)
        if linear.bias is not None and not column:
            yield Member(f"{name}.bias", 0, places, scored=False)


def mixture(module: nn.Module) -> str | None:
    """Where in a layer its experts and their router are; None where it has no mixture of experts."""
    found = (name for name, _ in module.named_modules() if name.rpartition(".")[2] == "experts")
    return next((name.rpartition(".")[0] for name in found), None)


def _of_experts(module: nn.Module) -> Iterable[Member]:
    """An expert's own matrices, its row of the router, and what else the router knows of it."""
    if (path := mixture(module)) is None:
        return
    tensors = {name: each for name, each in module.get_submodule(path).state_dict().items() if "shared" not in name}
    number = next(len(each) for name, each in tensors.items() if name.startswith("experts."))
    for name, tensor in tensors.items():
        if number not in (len(tensor), tensor.shape[-1]):
            raise UnsupportedModelError(f"nobody knows which experts own '{path}.{name}': leave them (experts: 1.0)")
        dim = 0 if len(tensor) == number else tensor.dim() - 1
        matrix = tensor.dim() > 1 and not name.endswith("bias")
        yield Member(f"{path}.{name}", dim, torch.arange(number)[:, None], scored=matrix)


def _of_groups(tensors: dict[str, Tensor], layer: Layer) -> Iterable[Member]:
    if (spec := layer.old.attention) is None:
        return
    groups = spec.num_kv_heads
    for name, tensor in tensors.items():
        part, last = name.partition(".")[0], name.rpartition(".")[2]
        dim = 1 if part in OUTPUTS or name in ROTATIONS else 0
        if (part in OUTPUTS and last == "bias") or (part in _NORMS and tensor.shape == (spec.head_dim,)):
            continue
        if part in LATENT or name in ("channel_index", "query_gain"):  # of the latent, and of what all heads share
            continue
        if part in FUSED:
            places = _fused(len(tensor), spec.num_heads, groups, spec.head_dim)
        elif part in (*OUTPUTS, *SEPARATE, *GATES, *SINKS, *ROTATIONS, "kv_b_proj") or _per_head(part, tensor, layer):
            places = torch.arange(tensor.shape[dim]).view(groups, -1)
        else:
            raise UnsupportedModelError(
                f"layer {layer.index}: nobody knows which heads own '{name}': leave heads out (heads: 1.0)"
            )
        yield Member(name, dim, places, scored=last == "weight" and tensor.dim() > 1 and part not in _NORMS)


def _per_head(part: str, tensor: Tensor, layer: Layer) -> bool:
    """Whether it is a norm with a row for each head."""
    return part in _NORMS and tensor.dim() == 2


def _fused(rows: int, heads: int, groups: int, size: int) -> Tensor:
    """Rows of queries, keys and values, one block after the other, by KV group."""
    blocks = torch.arange(rows).split([heads * size, groups * size, groups * size])
    return torch.cat([block.view(groups, -1) for block in blocks], 1)


def _of_latent(tensors: dict[str, Tensor], spec: LayerSpec) -> Iterable[Member]:
    places = torch.arange(spec.parts[1].kv_lora_rank)[:, None]
    for name, tensor in tensors.items():
        if name.partition(".")[0] in LATENT:
            yield Member(name, 0, places, scored=tensor.dim() > 1)
        elif name == "kv_b_proj.weight":
            yield Member(name, 1, places)

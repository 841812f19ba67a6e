"""Products with matrices whose blocks, a few key/value heads each, have nothing to do with each other.

One of the modelling files that travel with every converted checkpoint; it needs torch only.

Shapes: B batch, T new tokens, H query heads, G key/value heads, n numbers of all of them, w of a block.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from .dense_weight import affine_map


def grouped(query: Tensor, states: Tensor) -> Tensor:
    """Products [B,H,T,m] of [B,H,T,n] with [B or 1,G,n,m], whose heads are not copied."""
    groups = query.unflatten(1, (states.shape[1], -1)).flatten(2, 3)
    return (groups @ states).unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def mapped(states: Tensor, weight: Tensor, constant: Tensor) -> Tensor:
    """Products of states [B,t,n] with a weight [n,w], whose blocks of w rows each meet w numbers, plus a constant."""
    if (width := weight.shape[1]) == states.shape[-1]:
        return linear(states, weight, constant)
    blocks = states.unflatten(-1, (-1, width)).transpose(1, 2) @ weight.unflatten(0, (-1, width)).mT
    return blocks.transpose(1, 2).flatten(2) + constant


def mapped_columns(states: Tensor, weight: Tensor, constant: Tensor) -> Tensor:
    """The same of states [B,m,t] whose tokens lie side by side; a single block may have more rows than numbers."""
    count = states.shape[1] // weight.shape[1]
    blocks = weight.unflatten(0, (count, -1)) @ states.unflatten(1, (count, -1))
    return blocks.flatten(1, 2) + constant[:, None]


def through(module: nn.Module, states: Tensor, width: int) -> Tensor:
    """What an encoder or a decoder with blocks of ``width`` makes of states [B,t,n]."""
    if width == states.shape[-1]:
        made: Tensor = module(states)
        return made
    return mapped(states, *matrix(module, width, states))


def matrix(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [n,w] and constant [n] of an encoder or a decoder."""
    weight, constant = affine_map(module, width, like)
    return weight.to(like.dtype), constant.to(like.dtype)

"""Which KV heads share one.

Shapes: G KV heads of d numbers, P rope pairs.
"""

from __future__ import annotations

from torch import Tensor

from anymla.methods.kv_heads.moments import HeadMoments
from anymla.methods.kv_heads.shared import complex_moments


def alike_as_neighbours(moments: HeadMoments, pairs: int, group: int) -> list[int]:
    """An order of the KV heads in which groups of ``group`` neighbours hold the most in common.

    Greedy: the two heads that are most alike, then ever the one that is most like those, until the group is full.
    """
    common = overlaps(moments, pairs)
    left, order = [*range(len(common))], list[int]()
    while left and group > 1:
        among = common[left][:, left].fill_diagonal_(-1)
        members = [left[int(among.max(1).values.argmax())]]
        while len(members) < group:
            others = [head for head in left if head not in members]
            members.append(others[int(common[members][:, others].sum(0).argmax())])
        order += sorted(members)
        left = [head for head in left if head not in members]
    return order or left


def overlaps(moments: HeadMoments, pairs: int) -> Tensor:
    """How much of what two heads hold lies in common subspaces [G,G], 0 to 2: of keys and of values.

    ||E[a b^T]||^2 over the norms of E[a a^T] and E[b b^T] (linear CKA without centring); of ``pairs`` of the keys
    within each of them, as complex numbers, for only there they can be shared before rope.
    """
    channels = complex_moments(moments.key, pairs, len(moments.key))[0].abs().square().sum(0)  # [G,G]
    keys = channels + _squared(moments.key[:, 2 * pairs :, :, 2 * pairs :])
    return _cosines(keys) + _cosines(_squared(moments.value))


def _squared(moments: Tensor) -> Tensor:
    return moments.square().sum((1, 3))


def _cosines(squared: Tensor) -> Tensor:
    size = squared.diagonal().clamp_min(1e-300).sqrt()
    return squared / size / size[:, None]

"""Keep the pairs of each kv head that bring its scores nearest to the original's (EliteKV, arXiv 2503.01586)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper
from anymla.methods.mla.rope.choice import RopeChoice

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


@dataclass(frozen=True)
class Elite(RopeChoice):
    """RoPElite: of every kv head, k times the pair whose rotation, put back, leaves the least mean |score error|.

    Scores are those before the softmax, of all query heads of the group, on ``Moments.sample``. That is up to 128
    queries of up to four windows, against all keys that they may look at. A pair that is not kept stays at its position
    0, as in the paper, or rotates by its expected rotation.
    """

    name: ClassVar[str] = "elite"
    paper: ClassVar[Paper] = Paper(title="EliteKV", arxiv="2503.01586")
    summary: ClassVar[str] = "the frequencies of each head that its scores need most"

    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        import torch

        from anymla.distributed import from_first
        from anymla.methods.mla.channels import per_head_channels

        kv_heads, pairs = moments.key_norm.shape
        constant = moments.rotation if expected_rotation else torch.ones_like(moments.rotation)
        kept = rope_dims // 2 // kv_heads
        frequencies = [greedy(score_changes(moments, constant, head), kept) for head in range(kv_heads)]
        return per_head_channels(from_first(torch.stack(frequencies)), pairs)


def score_changes(moments: Moments, constant: Tensor, head: int) -> Tensor:
    """What each pair's rotation adds to the scores of kv head ``head``, Re(q k* (e^{i Delta theta} - constant)), [P,N].

    ``constant`` [H,P] stands in for the rotation; N counts query heads, windows and pairs of tokens of the sample.
    """
    import torch

    from anymla.methods.mla.moments import to_complex

    sample, pairs = moments.sample, constant.shape[1]
    group = len(constant) // sample.key.shape[1]
    key = to_complex(sample.key[:, head, :, : 2 * pairs]).conj()  # [S,T,P]
    changes = []
    for query_head in range(head * group, (head + 1) * group):
        query = to_complex(sample.query[:, query_head, :, : 2 * pairs])  # [S,R,P]
        turn = sample.turn - constant[query_head].to(sample.turn.dtype)
        changes.append((query[:, :, None] * key[:, None] * turn).real[:, sample.allowed].flatten(0, 1))
    return torch.cat(changes).T.contiguous()


def greedy(changes: Tensor, kept: int) -> Tensor:
    """Indices [kept] of rows of ``changes`` [P,N], each the one that leaves the least mean |sum of the others|."""
    import torch

    left, free = changes.sum(0), torch.ones(len(changes), dtype=torch.bool, device=changes.device)
    chosen: list[int] = []
    for _ in range(kept):
        errors = (left - changes).abs().mean(1).masked_fill(~free, torch.inf)
        best = int(errors.argmin())
        chosen.append(best)
        left, free[best] = left - changes[best], False
    return torch.tensor(chosen, dtype=torch.long, device=changes.device)

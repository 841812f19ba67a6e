"""Absorbed attention of few new tokens on a GPU, in Triton: the cache is read once, as numbers or as codes.

One of the modelling files that travel with every converted checkpoint; decode_kernel.py says when it is used, and
triton_kernels.py has what a GPU runs.

Shapes: B batch, T new tokens, S cached tokens, H query heads, r latent rank, R rope dims, K = ceil(R / 2) pairs, F
tokens that are left out, N tokens of a tile, n coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .code_layout import CodeForm
from .triton_kernels import attend as attend_kernel
from .triton_kernels import combine as combine_kernel

ONE_TILE = 1 << 15  # numbers of the sums that a program holds at most: 128 rows of 256, 64 of 512
PROGRAMS_PER_CORE = 2
MOST_SHARED = 227 << 10  # bytes of shared memory that a program has on the largest GPUs


class Cached(NamedTuple):
    """What the kernel reads: ``rows`` [B,S,..] of numbers, or of bytes that ``places`` and ``levels`` explain."""

    rows: Tensor
    form: CodeForm = CodeForm()
    places: Tensor | None = None
    levels: Tensor | None = None


class Turns(NamedTuple):
    """Rope of a cache before rope: cos and sin of tiles' first columns [S / N,K], and of columns in a tile [N,K]."""

    tile_cos: Tensor
    tile_sin: Tensor
    cos: Tensor
    sin: Tensor


class Tiling(NamedTuple):
    """How the work is cut: rows and tokens of a program's tile, tokens of a split (whole tiles), warps."""

    rows: int
    tokens: int
    per_split: int
    warps: int


def attend(
    query_latent: Tensor,
    query_rope: Tensor,
    latent: Cached,
    rope: Cached,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    turns: Turns | None = None,
    left_out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every head over the one latent that they share, as absorbed.absorbed_attention.

    Args:
        query_latent: [B,H,T,r].
        query_rope: [B,H,T,R], turned by its own position.
        latent: of S tokens.
        rope: their rope keys; before rope if there are ``turns``.
        mask: None, bool (True = may attend) or additive, [B or 1,H or 1,T,S].
        scale: of scores, before soft-cap and mask.
        softcap: bound of the scores.
        sinks: logits [H] of a key without a value.
        turns: the angles of rope, of tiles of ``tile_tokens``.
        left_out: columns [B,F], int64, that are not attended to; those below zero mean nothing.
        tiling: how the work is cut; None: as ``chosen_tiling`` says.

    Returns:
        The context [B,H,T,r] in the query's dtype, and in float32 the logarithm [B,H,T] of what the softmax divides by.
    """
    (batch, heads, new, rank), ropes = query_latent.shape, query_rope.shape[-1]
    rows, length, like = heads * new, latent.rows.shape[1], query_latent
    tiling = tiling or chosen_tiling(like, length)
    splits = cdiv(length, tiling.per_split)
    parts = torch.empty(batch, rows, splits, rank, dtype=torch.float32, device=like.device)
    totals = torch.empty(batch, rows, splits, dtype=torch.float32, device=like.device)
    given = like if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    spread = (0, 0, 0, 0) if mask is None else given.expand(batch, heads, new, length).stride()
    context = torch.empty_like(query_latent, memory_format=torch.contiguous_format)
    log_totals = torch.empty(batch, heads, new, dtype=torch.float32, device=like.device)
    with torch.cuda.device_of(like):  # Triton runs on the current device
        attend_kernel[cdiv(rows, tiling.rows), splits, batch](
            *(states.contiguous() for states in (query_latent, query_rope)),
            latent.rows, rope.rows, *_explained(latent), *_explained(rope), tuple(turns or [like] * 4),
            given, like if left_out is None else left_out.contiguous(), 0 if left_out is None else left_out.shape[1],
            parts, totals, scale, softcap or 1.0, rows, new, length, tiling.per_split,
            latent.rows.stride()[:2], rope.rows.stride()[:2], spread,
            RANK=rank, ROPE=ropes, LATENT_FORM=tuple(latent.form), ROPE_FORM=tuple(rope.form), TURN=turns is not None,
            MASKED=0 if mask is None else 1 if mask.dtype == torch.bool else 2, CAPPED=softcap is not None,
            H=tiling.rows, N=tiling.tokens, R=_padded(rank), K=_padded(-(-ropes // 2)),
            WIDENED=like.device.type == "cpu", num_warps=tiling.warps,
        )  # fmt: skip
        combine_kernel[batch * rows,](
            parts, totals, like if sinks is None else sinks.contiguous(), context, log_totals, splits, new, heads,
            RANK=rank, R=_padded(rank), SINKS=sinks is not None,
        )  # fmt: skip
    return context, log_totals


def chosen_tiling(query: Tensor, length: int) -> Tiling:
    """One for queries [B,H,T,r] and so many cached tokens: as many programs as the device takes at once."""
    batch, heads, new, rank = query.shape
    wide, tokens, device = _padded(rank), tile_tokens(rank, query.dtype), query.device
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    shared = getattr(gpu, "shared_memory_per_block_optin", MOST_SHARED)
    rows = min(_padded(heads * new), most_rows(rank, query.dtype, shared))
    cores = gpu.multi_processor_count if gpu else 2
    splits = max(1, PROGRAMS_PER_CORE * cores // (batch * cdiv(heads * new, rows)))
    per_split = cdiv(cdiv(length, splits), tokens) * tokens
    return Tiling(rows, tokens, per_split, warps=8 if rows * wide >= ONE_TILE // 2 else 4)


def most_rows(rank: int, dtype: torch.dtype, shared: int) -> int:
    """Rows of a program whose tile fits into ``shared`` bytes of memory, in 16 rows at least.

    It holds the queries, two tiles of the cache, as one is fetched while the other is read, and the weights.
    """
    wide, tokens = _padded(rank), tile_tokens(rank, dtype)
    rows = max(16, min(128, ONE_TILE // wide))
    while rows > 16 and (rows * (wide + tokens) + 2 * tokens * wide) * dtype.itemsize > shared:
        rows //= 2
    return rows


def tile_tokens(rank: int, dtype: torch.dtype) -> int:
    """Cached tokens that a program holds at a time, in all tilings of a cache before rope."""
    return max(16, min(64, ONE_TILE // (_padded(rank) * dtype.itemsize)))


def _padded(size: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length() if size else 0)


def _explained(cached: Cached) -> tuple[Tensor, Tensor]:
    places, levels = (cached.rows if each is None else each for each in (cached.places, cached.levels))
    return places, levels


def cdiv(size: int, part: int) -> int:
    """Parts that hold all of it."""
    return -(-size // part)

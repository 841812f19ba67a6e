"""Attention in latent space: the cache is read as it is and never expanded.

One of the modelling files that travel with every converted checkpoint; it needs torch only. What is here is torch's
way and the reference; decode_kernel.py says when a kernel does it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

from .decode_kernel import uses_kernel

# Sizes of one sequence's latents (numbers) from which, in float32 on a CPU, another way to write the products beats
# the plain one, whose calls are the cheapest. Measured on two AVX-512 cores with benchmarks/decode.py.
TALL_SIZE = 1 << 17  # scores as [tokens, rows]: MKL is up to twice as fast with the long side first
STREAM_SIZE = 1 << 20  # convolutions: oneDNN streams the cache in memory order, MKL's product repacks it
FEW_ROWS = 64  # query rows (heads x tokens) up to which this holds: more are compute bound anyway
BLOCK = 256  # a maximum over the long axis of [tokens, rows] runs on one core, one over this many blocks does not


def absorbed_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    value: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every head over the one latent that they share.

    query_latent [B,H,T,r], query_rope [B,H,T,R], latent [B,1,S,r], rope_key [B,1,S,R]; mask None, bool (True = may
    attend) or additive, [B or 1,H or 1,T,S]; value [B,1,S,V], None: the latent; sinks [H] are logits of a key without a
    value. Returns softmax(cap(scale * scores) + mask) @ value, [B,H,T,V]; where ``summed``, also the logarithm of what
    the softmax divides by, [B,H,T], to merge this with attention to other tokens.
    """
    read = (latent, rope_key) if sinks is None else (latent, rope_key, sinks)
    if (value is None or value is latent) and uses_kernel(query_latent, *read):
        from .triton_decode import Cached, attend  # Triton is loaded only where it is used

        cached = (Cached(latent[:, 0]), Cached(rope_key[:, 0]))
        return attend(query_latent, query_rope, *cached, mask, scale, softcap=softcap, sinks=sinks)
    heads, new = query_latent.shape[1:3]
    # All heads share the cache: (head, token) pairs are the rows of one matrix product. Left to broadcast, matmul would
    # read (in bfloat16 even copy) the cache once per head.
    query, query_rope = (query_latent * scale).flatten(1, 2), (query_rope * scale).flatten(1, 2)
    latent, rope_key, value = latent.squeeze(1), rope_key.squeeze(1), (latent if value is None else value).squeeze(1)
    sink_rows = None if sinks is None else sinks.to(query.dtype).repeat_interleave(new)
    if mask is not None:
        mask = additive_mask(mask, query.dtype).expand(len(query), -1, -1, -1)
    thin = query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[1] <= FEW_ROWS
    size = latent[0].numel() if latent.stride(-1) == 1 else 0  # coded ones have all tokens of a number side by side
    if not (thin and size >= STREAM_SIZE and latent.shape[1] >= BLOCK):
        tall = thin and size >= TALL_SIZE
        both = _attend(query, query_rope, latent, rope_key, value, mask, new, tall, softcap, sink_rows, summed)
        return _per_head(*both, heads)
    masks = [None] * len(query) if mask is None else mask
    sequences = zip(zip(query, query_rope, latent, rope_key, strict=True), value, masks, strict=True)
    found = (_stream(*own, values, shown, softcap, sink_rows) for own, values, shown in sequences)
    contexts, totals = zip(*found, strict=True)
    return _per_head(torch.stack(contexts), torch.stack(totals) if summed else None, heads)


def _per_head(context: Tensor, log_total: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """Rows [B,HT,..] as [B,H,T,..]."""
    rows = (heads, -1)
    return context.unflatten(1, rows), None if log_total is None else log_total.unflatten(1, rows)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool (True = may attend) or additive mask as an additive one, bounded: a row all masked stays finite."""
    lowest = torch.finfo(dtype).min / 2
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp_min(lowest)


def _attend(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    new: int,
    tall: bool,
    softcap: float | None,
    sinks: Tensor | None,
    summed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Plain products; query [B,HT,r] already scaled. ``tall`` puts the long side, tokens, first."""
    scores = torch.bmm(latent, query.mT) if tall else torch.bmm(query, latent.mT)
    if query_rope.shape[-1]:
        scores.baddbmm_(*((rope_key, query_rope.mT) if tall else (query_rope, rope_key.mT)))
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if tall:
        scores = scores.mT.contiguous()
    if mask is not None:
        scores.unflatten(1, (-1, new)).add_(mask)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None].expand(len(scores), -1, -1)], dim=-1)
    weights, log_total = scores.softmax(-1), None  # computes in float32 for 16-bit numbers
    if summed:  # the largest weight is exp(the largest score) over the total
        precision = torch.promote_types(scores.dtype, torch.float32)
        log_total = scores.amax(-1).to(precision) - weights.amax(-1).to(precision).log()
    weights = weights[..., : latent.shape[1]]
    return torch.bmm(value.mT, weights.mT).mT if tall else torch.bmm(weights, value), log_total


def _stream(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence, by the forward pass and the weight gradient of a 1x1 convolution.

    Tokens are the pixels, latent numbers the channels. The same sums as two matrix products.
    """
    rows, length = len(query), len(latent)
    image, values = (states.reshape(1, length, 1, -1).permute(0, 3, 1, 2) for states in (latent, value))
    scores = conv2d(image, query[:, :, None, None])[0, :, :, 0].T.contiguous()  # [S, rows], the layout it already has
    if query_rope.shape[-1]:
        scores.addmm_(rope_key, query_rope.T)
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if mask is not None:
        scores.T.unflatten(0, (-1, mask.shape[-2])).add_(mask)
    blocks = scores[: length // BLOCK * BLOCK].view(BLOCK, -1).amax(0).view(-1, rows)
    peak = torch.maximum(blocks.amax(0), scores[-BLOCK:].amax(0))  # the rest may overlap the blocks
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    peak = peak.detach()  # it cancels, gradients included
    weights = scores.sub_(peak).exp_()
    context = conv2d_weight(values, (rows, values.shape[1], 1, 1), weights.T[None, :, :, None]).flatten(1)
    total = weights.sum(0) if sinks is None else weights.sum(0) + (sinks - peak).exp()
    return context / total[:, None], total.log() + peak

"""A window of exact tokens: full keys and values of the latest ones, the latent for all older ones, in one softmax.

One of the modelling files that travel with every converted checkpoint. It needs only torch and transformers. Each query
sees the last w tokens, itself included, through full keys and values, as the original does. It sees everything before
through the latent. That costs w tokens of the original's cache, however long the context is.

Shapes: B batch, T new tokens, S cached tokens, E = T + w - 1 (at most S) exact tokens, H query heads, G key/value
heads, d head_dim, R rope dims, r latent rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from .absorbed import absorbed_attention, additive_mask
from .exact_cache import make_room
from .heads import attention_weights, score_bias
from .latent_attention import LatentAttention
from .spec import LayerSpec

BLOCK = 128  # queries at a time where keys are expanded: bounds memory to their scores


def heads_product(query: Tensor, key: Tensor) -> Tensor:
    """Products [B,H,T,S] of query [B,H,T,n] and key [B,G,S,n], whose heads are not copied."""
    groups = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (groups @ key.mT).view(*query.shape[:3], key.shape[2])


class Pairs(NamedTuple):
    """Which of the last ``new`` of ``length`` tokens see which others by the latent, and which exactly."""

    mask: Tensor | None  # [B,1 or H,T,S], bool or additive
    new: int
    length: int
    window: int

    def bias(self, rows: slice, columns: slice, like: Tensor, *, old: bool) -> Tensor:
        """What the mask leaves of pairs at a distance of the window or more (``old``), or of nearer ones.

        Additive, [B or 1,1 or H,t,s], in the dtype of ``like``.
        """
        lowest = torch.finfo(like.dtype).min / 2
        given = None if self.mask is None else additive_mask(self.mask[..., rows, columns], like.dtype)
        if old and self.new == 1:  # no more work per cached token than needs be
            bias = like.new_zeros(1, 1, 1, columns.stop) if given is None else given.clone()
            bias[..., max(0, self.length - self.window) :] = lowest
            return bias
        first = self.length - self.new
        places = torch.arange(first + rows.start, first + rows.stop, device=like.device)
        distance = places[:, None] - torch.arange(columns.start, columns.stop, device=like.device)
        allowed = distance >= self.window if old else (distance >= 0) & (distance < self.window)
        bias = additive_mask(allowed[None, None], like.dtype)
        return bias if given is None else (bias + given).clamp_min(lowest)


class Exact(NamedTuple):
    """Queries [B,H,T,d] with the original's rope, and the keys and values [B,G,E,d] that they see exactly.

    ``missing`` [B,H,T,1]: what the scores of old tokens lack, a constant per query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    missing: Tensor

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """Scores [B,H,t,e] that lack the same, not scaled, in float32 or finer: a difference of large numbers."""
        precision = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, :, rows].to(precision), self.key[:, :, columns].to(precision)
        return heads_product(query, key) - self.missing[:, :, rows]


class ExactWindowAttention(LatentAttention):
    """Latent attention beside a window of tokens with keys and values of their own.

    The arguments are those of LatentAttention. ``key_mean`` [G,d] is what keys by the latent lack. A constant of
    all keys would cancel in the softmax. One of the old keys alone does not, so exact scores leave it out too.
    """

    def __init__(self, original: Any, config: Any, spec: LayerSpec) -> None:
        super().__init__(original, config, spec)
        self.exact_window = spec.parts[1].exact_window
        self.key_mean = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim))

    def make_room(self, cache: Any) -> None:
        """Gives ``cache`` room for the exact tokens of this layer."""
        make_room(cache, self.layer_idx, self.exact_window)

    def _make_projections(self, hidden: int, spec: LayerSpec) -> None:
        super()._make_projections(hidden, spec)
        if self.spec.linear_keys:  # the latent is made of x
            self.k_proj, self.v_proj = (nn.Linear(hidden, self.num_kv_heads * self.head_dim) for _ in range(2))

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        places: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new tokens into the cache and attends to all of it; returns [B,T,H,d] and no weights.

        Raises:
            NotImplementedError: a mask or a cache of a kind that says nothing of single tokens.
        """
        key, value = self.true_key(hidden_states), self.true_value(hidden_states)
        latent, rope_key = self.compress(hidden_states, *places, (key, value))
        exact = (self.rotated(key, *places), value)
        if cache is not None:
            self.make_room(cache)
            (latent, rope_key), exact = cache.update(latent, rope_key, self.layer_idx, exact)
        mask = score_bias(mask, self.spec, self.config, hidden_states, latent.shape[2], kwargs)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise NotImplementedError("a model with an exact window runs with attn_implementation sdpa or eager only")
        queries, true_query = self.queries(query, *places), self.rotated(query, *places)
        if self.query_gain is not None:
            true_query = true_query * self.query_gain
        precision = torch.promote_types(query.dtype, torch.float32)
        missing = heads_product(queries[0].to(precision), self.key_mean[None, :, None].to(precision))
        seen = Exact(true_query, *exact, missing)
        pairs = Pairs(mask, query.shape[2], latent.shape[2], self.exact_window)
        if self.absorbs(query.shape[2], mask) and (up := self.up_projections(query)) is not None:
            output = self._absorbed(queries, (latent, rope_key), seen, pairs, up)
        else:
            output = self._expanded(queries, (latent, rope_key), seen, pairs)
        return output.transpose(1, 2), None

    def _expanded(
        self, queries: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], exact: Exact, pairs: Pairs
    ) -> Tensor:
        """Both kinds of scores in one softmax, some rows at a time; returns [B,H,T,d].

        queries: [B,H,T,d] and [B,H,T,R]; cached: latent [B,1,S,r] and rope key [B,1,S,R].
        """
        (key, value), query = self.expand_kv(*cached), torch.cat(queries, dim=-1)
        new, length, gone = query.shape[2], key.shape[2], key.shape[2] - exact.key.shape[2]
        outputs = []
        for start in range(0, new, BLOCK):
            rows = slice(start, min(new, start + BLOCK))
            first, last = length - new + rows.start, length - new + rows.stop  # the first row's place, after the last
            old, late = slice(0, max(0, last - self.exact_window)), slice(max(0, first - self.exact_window + 1), last)
            held = slice(late.start - gone, late.stop - gone)
            far = heads_product(query[:, :, rows], key[:, :, old])
            scores = torch.cat([far, exact.scores(rows, held)], -1) * self.scaling
            bias = torch.cat([pairs.bias(rows, old, scores, old=True), pairs.bias(rows, late, scores, old=False)], -1)
            weights = attention_weights(scores, bias, self.spec.softcap, self.sinks).to(value.dtype)
            weights = dropout(weights, self.attention_dropout, self.training)
            by_latent, exactly = weights.split([far.shape[-1], weights.shape[-1] - far.shape[-1]], dim=-1)
            output = heads_product(by_latent, value[:, :, old].mT)
            outputs.append(output + heads_product(exactly, exact.value[:, :, held].mT))
        return torch.cat(outputs, dim=2)

    def _absorbed(
        self,
        queries: tuple[Tensor, Tensor],
        cached: tuple[Tensor, Tensor],
        exact: Exact,
        pairs: Pairs,
        up: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Two attentions, each weighted with its share of the one softmax; shapes as above, ``up``: W_uk and W_uv."""
        (latent, rope_key), dtype = cached, cached[0].dtype
        rows, held = slice(0, pairs.new), slice(0, exact.key.shape[2])
        late = slice(pairs.length - held.stop, pairs.length)
        scores = exact.scores(rows, held) * self.scaling
        if (softcap := self.spec.softcap) is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores + pairs.bias(rows, late, scores, old=False)
        near_output = heads_product(scores.softmax(-1).to(dtype), exact.value.mT)
        # the whole cache with a mask, not a slice of it, which kernels for 16 bits would copy
        far_mask = pairs.bias(rows, slice(0, pairs.length), latent, old=True)
        query_latent, query_rope = self.into_latent(queries[0], up[0]), queries[1]
        context, far_total = absorbed_attention(
            query_latent,
            query_rope,
            latent,
            rope_key,
            far_mask,
            self.scaling,
            softcap=softcap,
            sinks=self.sinks,
            summed=True,
        )
        share = torch.sigmoid(far_total.to(scores.dtype)[..., None] - scores.logsumexp(-1, keepdim=True))  # type: ignore[union-attr]
        return self.out_of_latent(context * share.to(dtype), up[1]) + near_output * (1 - share).to(dtype)

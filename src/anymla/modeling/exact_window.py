"""A window of exact tokens: the latest keys and values as the original has them, the latent for all older ones.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only. Each query
sees the last w tokens, itself among them, through their own keys and values and everything before through the latent,
in one softmax. The window costs w tokens of the original's cache, however long the context is.

Shapes: B batch, T new tokens, S cached tokens, E = T + w - 1 (at most S) exact tokens, H query heads, G key/value
heads, d head_dim, R rope dims, r latent rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .absorbed import absorbed_attention, additive_mask
from .heads import attention_weights, multiply_pairs, score_bias
from .latent_attention import LatentAttention

BLOCK = 128  # queries at a time where keys are expanded: bounds memory to their scores


class ExactWindowLayer(DynamicLayer):
    """A layer of transformers' DynamicCache that holds, beside latent and rope key, ``exact`` keys and values."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.exact = DynamicSlidingWindowLayer(window)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch, for beam search."""
        super().reorder_cache(beam_idx)
        self.exact.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        self.exact.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch."""
        super().batch_select_indices(indices)
        self.exact.batch_select_indices(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes the latest tokens.

        Raises:
            ValueError: exact keys that would be needed then are gone already.
        """
        self.exact.crop(*args, **kwargs)
        super().crop(*args, **kwargs)

    def activate_past_recording(self) -> None:
        """Keeps exact tokens until the next ``crop``, as assisted decoding asks for."""
        self.exact.activate_past_recording()

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.exact.reset()

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        super().offload()
        self.exact.offload()

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        super().prefetch()
        self.exact.prefetch()


def exact_layer(cache: Any, index: int, window: int) -> DynamicSlidingWindowLayer:
    """Where ``cache``, a DynamicCache, keeps the exact tokens of layer ``index``; made when it is first asked for.

    Raises:
        NotImplementedError: a kind of cache that has no room for them.
    """
    layers: list[Any] = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:  # a cache made without a config grows as it is used
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    if type(layers[index]) is DynamicLayer and not layers[index].is_initialized:
        layers[index] = ExactWindowLayer(window)
    if not isinstance(layers[index], ExactWindowLayer):
        kind = type(layers[index]).__name__
        raise NotImplementedError(f"a model with an exact window of {window} tokens needs a DynamicCache, got a {kind}")
    exact: DynamicSlidingWindowLayer = layers[index].exact
    return exact


def far_and_near(new: int, length: int, rows: slice, window: int, device: Any) -> tuple[Tensor, Tensor]:
    """Which of ``length`` tokens some ``rows`` of the last ``new`` see by the latent, and which exactly: bool [t,S].

    Columns of the first end where no row sees further, those of the second begin where none sees further back.
    """
    places = torch.arange(length - new + rows.start, length - new + rows.stop, device=device)[:, None]
    last, first = max(0, length - new + rows.stop - window), max(0, length - new + rows.start - window + 1)
    far = torch.arange(last, device=device) <= places - window
    columns = torch.arange(first, length - new + rows.stop, device=device)
    return far, (columns <= places) & (columns > places - window)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """Products [B,H,T,S] of query [B,H,T,n] and key [B,G,S,n], whose heads are not copied."""
    groups = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (groups @ key.mT).view(*query.shape[:3], key.shape[2])


def bias_of(mask: Tensor | None, allowed: Tensor, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """What a mask, None or [B,1 or H,T,S] (bool or additive), leaves of ``allowed`` [t,s]: additive, [B,1 or H,t,s]."""
    bias = additive_mask(allowed[None, None], dtype)
    return bias if mask is None else additive_mask(bias + additive_mask(mask[..., rows, columns], dtype), dtype)


class Exact(NamedTuple):
    """Queries [B,H,T,d] with the original's rope, and the keys and values [B,G,E,d] that they see exactly.

    ``missing`` [B,H,T,1]: what the scores of old tokens lack, a constant per query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    missing: Tensor

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """Scores [B,H,t,e] that lack the same, not scaled."""
        return scores_of(self.query[:, :, rows], self.key[:, :, columns]) - self.missing[:, :, rows]


class ExactWindowAttention(LatentAttention):
    """Latent attention beside ``exact_window`` tokens of the original's keys and values.

    The other arguments are those of LatentAttention. The latent is made of true keys and values, as they exist anyway.
    ``key_mean`` [G,d] is what keys by the latent lack: a constant of all keys would cancel in the softmax, one of the
    old keys alone does not, so exact scores go without it as well.
    """

    keeps_keys = True

    def __init__(self, original: Any, config: Any, *, exact_window: int, **features: Any) -> None:
        super().__init__(original, config, **features)
        self.exact_window = exact_window
        self.key_mean = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim))

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new tokens into the cache and attends to all of it; returns [B,T,H,d] and no weights.

        Raises:
            NotImplementedError: a mask or a cache of a kind that says nothing of single tokens.
        """
        key, value = self.true_kv(hidden_states)
        latent, rope_key = (part.unsqueeze(1) for part in self.encode(key, value))
        cached = latent, multiply_pairs(rope_key, *(table[..., self.turns] for table in rope))
        key = self._turned(key, *rope)
        if cache is not None:
            room = exact_layer(cache, self.layer_idx, self.exact_window)
            cached, (key, value) = cache.update(*cached, self.layer_idx), room.update(key, value)
        mask = score_bias(mask, self, hidden_states, cached[0].shape[2], kwargs)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise NotImplementedError("a model with an exact window runs with attn_implementation sdpa or eager only")
        queries, true_query = self.queries(query, *rope), self._turned(query, *rope)
        if self.query_gain is not None:
            true_query = true_query * self.query_gain
        exact = Exact(true_query, key, value, scores_of(queries[0], self.key_mean[None, :, None]))
        in_latent_space = self.absorbs(query.shape[2], mask)
        output = (self._absorbed if in_latent_space else self._expanded)(queries, cached, exact, mask)
        return output.transpose(1, 2), None

    def _turned(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """True queries or keys [B,N,T,d] with the original's rope."""
        pairs, rest = heads.split([2 * self.rope_pairs, self.head_dim - 2 * self.rope_pairs], dim=-1)
        return torch.cat([multiply_pairs(pairs, cos, sin), rest], dim=-1)

    def _expanded(
        self, queries: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], exact: Exact, mask: Tensor | None
    ) -> Tensor:
        """Both kinds of scores in one softmax, some rows at a time; returns [B,H,T,d].

        queries: [B,H,T,d] and [B,H,T,R]; cached: latent [B,1,S,r] and rope key [B,1,S,R].
        """
        (key, value), query = self.expand_kv(*cached), torch.cat(queries, dim=-1)
        new, length, gone = query.shape[2], key.shape[2], key.shape[2] - exact.key.shape[2]
        outputs = []
        for start in range(0, new, BLOCK):
            rows = slice(start, min(new, start + BLOCK))
            far, near = far_and_near(new, length, rows, self.exact_window, query.device)
            old, late = (
                slice(0, far.shape[1]),
                slice(length - new + rows.stop - near.shape[1], length - new + rows.stop),
            )
            held = slice(late.start - gone, late.stop - gone)
            scores = [scores_of(query[:, :, rows], key[:, :, old]), exact.scores(rows, held)]
            biases = [bias_of(mask, far, rows, old, query.dtype), bias_of(mask, near, rows, late, query.dtype)]
            weights = attention_weights(
                torch.cat(scores, -1) * self.scaling, torch.cat(biases, -1), self.softcap, self.sinks
            )
            weights = dropout(weights, self.attention_dropout, self.training)
            by_latent, exactly = weights.split([far.shape[1], near.shape[1]], dim=-1)
            outputs.append(scores_of(by_latent, value[:, :, old].mT) + scores_of(exactly, exact.value[:, :, held].mT))
        return torch.cat(outputs, dim=2)

    def _absorbed(
        self, queries: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], exact: Exact, mask: Tensor | None
    ) -> Tensor:
        """Two attentions, each weighted with its share of the one softmax; shapes as above."""
        (latent, rope_key), new = cached, queries[0].shape[2]
        length, dtype, every = latent.shape[2], latent.dtype, slice(0, new)
        far, near = far_and_near(new, length, every, self.exact_window, latent.device)
        old, late = slice(0, far.shape[1]), slice(length - near.shape[1], length)
        held = slice(exact.key.shape[2] - near.shape[1], exact.key.shape[2])
        scores = exact.scores(every, held).to(torch.promote_types(dtype, torch.float32)) * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        scores = scores + bias_of(mask, near, every, late, scores.dtype)
        near_total = scores.logsumexp(-1, keepdim=True)
        near_output = scores_of((scores - near_total).exp().to(dtype), exact.value[:, :, held].mT)
        if not far.shape[1]:
            if self.sinks is None:
                return near_output
            return near_output * torch.sigmoid(near_total - self.sinks[:, None, None]).to(dtype)
        far_mask = None if mask is None and new == 1 else bias_of(mask, far, every, old, dtype)
        features: dict[str, Any] = {"softcap": self.softcap, "sinks": self.sinks, "summed": True}
        parts = (self.into_latent(queries[0]), queries[1], latent[:, :, old], rope_key[:, :, old], far_mask)
        context, far_total = absorbed_attention(*parts, self.scaling, **features)
        share = torch.sigmoid(far_total.to(near_total.dtype)[..., None] - near_total)  # type: ignore[union-attr]
        return self.out_of_latent(context * share.to(dtype)) + near_output * (1 - share).to(dtype)

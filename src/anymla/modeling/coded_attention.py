"""Attention whose cache holds codes: a row of bytes for the keys of a token, taken before rope, and one for its values.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only. What
methods build (shapes as in torch.nn.Linear, weight [out,in]; n = G d):

    q_proj [H d,D], k_proj [n,D], v_proj [n,D], o_proj [D,H d], each with a bias; gate_proj, sinks, norms, query_gain as
    in LatentAttention. A head is [P real parts | P imaginary parts | rest].
    Coefficients z = (k - mean) E, of values likewise. In the basis "own" they are k itself: no encoder, no decoder.
    E is block diagonal: a block is b key/value heads (``key_block``, ``value_block``), w = b d coefficients.
    Where keys are linear in x, E and the mean are folded into k_proj; elsewhere (LayerSpec.encodes_keys) norm and clip
    follow k_proj, then key_encoder [n,w]: the blocks of E^T under each other, bias -mean E. value_encoder
    (LayerSpec.encodes_values) likewise.
    key_decoder, value_decoder [n,w]: the blocks of (E^-1)^T, bias the mean; absent in the basis "own".
    key_codec, value_codec: make_codec of the spec's codings, with their buffers.
    inv_freq [P], int32: the bits of float32 numbers, which a cast of the model must not round: the angle by which a
    pair turns per position, negative where the family turns backwards. ``inv_freq.view(torch.float32)`` reads it.
    channel_index [G P], int64, in the basis "channels" only: the rope pair with which a channel turns. The
    coefficients of a block are [b P real parts | b P imaginary parts | b (d - 2 P) of dims without rope].

Shapes: B batch, T new tokens, S cached tokens, H query heads, G key/value heads, d head_dim, P rope pairs, c tokens of
a chunk, m blocks of w coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .absorbed import additive_mask
from .arguments import make_fit
from .attention import ConvertedAttention, joined
from .block_maps import grouped, mapped, matrix, through
from .codecs import make_codec
from .coded_cache import NewTokens, PlacedTokens, Places, make_room
from .coding_spec import CodedSpec
from .heads import attention_weights, causal_mask, multiply_pairs, score_bias
from .spec import LayerSpec

Product = Callable[[int, Tensor], Tensor]  # of a chunk's number and coefficients [B,c,G d]: scores [B,H,T,c]
CHUNK = 1 << 18  # numbers of cached keys or values that are read at a time in decode: they stay in a CPU's cache
FEW = 16  # new tokens up to which the cache is read in chunks


class Rows(NamedTuple):
    """What the new tokens see: rows of bytes [B,S,row_bytes], and what belongs in some columns instead."""

    keys: Tensor
    values: Tensor
    places: tuple[Places, ...]
    start: int  # the column of the first new token
    latest: tuple[Tensor, Tensor] | None = (
        None  # coefficients [B,E,n] of the last tokens, where queries see them exactly
    )

    def before(self, stop: int) -> Rows:
        """Those in the columns before ``stop``."""
        return self._replace(keys=self.keys[:, :stop], values=self.values[:, :stop])


class CodedAttention(ConvertedAttention):
    """Attention over a cache of codes that stands in for the attention module ``original`` of one layer.

    A cached token's position is its column, for scores see differences of positions only.
    """

    inv_freq: Tensor
    channel_index: Tensor | None
    key_decoder: nn.Module | None
    value_decoder: nn.Module | None
    coded: CodedSpec

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        if spec.coded is None:
            raise ValueError(f"the layer at {spec.module} has no coded cache")
        self.coded, size = spec.coded, self.num_kv_heads * self.head_dim
        self.key_width, self.value_width = keys, values = self.coded.block_widths(self.spec)
        self.k_proj, self.v_proj = nn.Linear(hidden, size), nn.Linear(hidden, size)
        self.key_encoder = nn.Linear(keys, size) if spec.encodes_keys else None
        self.value_encoder = nn.Linear(values, size) if spec.encodes_values else None
        self.key_decoder = None if self.coded.key_basis == "own" else nn.Linear(keys, size)
        self.value_decoder = None if self.coded.value_basis == "own" else nn.Linear(values, size)

    def _make_buffers(self, spec: LayerSpec) -> None:
        self.key_codec, self.value_codec = make_codec(self.coded.keys), make_codec(self.coded.values)
        self.register_buffer("inv_freq", torch.zeros(self.rope_pairs, dtype=torch.int32))
        channels = torch.zeros(self.num_kv_heads * self.rope_pairs, dtype=torch.long)
        self.register_buffer("channel_index", channels if self.coded.key_basis == "channels" else None)

    def make_room(self, cache: Any) -> Any:
        """Gives ``cache`` room for the rows of this layer."""
        return make_room(cache, self.layer_idx, self.coded.first_tokens, self.coded.exact_window)

    def places(self, position_embeddings: Any, position_ids: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """The positions [B or 1,T], where the family says them."""
        return position_ids if position_ids is None or position_ids.dim() == 2 else position_ids[0]

    def coefficients(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is coded of the new tokens: keys and values [B,T,G d] in their bases."""
        keys, values = joined(self.true_key(hidden_states)), joined(self.true_value(hidden_states))
        keys = keys if self.key_encoder is None else through(self.key_encoder, keys, self.key_width)
        return keys, values if self.value_encoder is None else through(self.value_encoder, values, self.value_width)

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        places: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Puts the new tokens' rows into the cache and attends to all of it; returns [B,T,H,d] and the weights."""
        tokens = NewTokens(*self.coefficients(hidden_states), places)
        rows = None if cache is None else self._cached(tokens, cache)
        start, length = (0, query.shape[2]) if rows is None else (rows.start, rows.keys.shape[1])
        mask = score_bias(mask, self.spec, self.config, hidden_states, length, kwargs)
        if rows is not None and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            stop = start + query.shape[2]  # a static cache has empty rows behind
            rows, mask = rows.before(stop), mask if mask is None else mask[..., :stop]
        query = self._scaled(query, places, start)
        if rows is not None and self.reads_chunks(query.shape[2], mask):
            return self.attend_few(query, rows, mask), None
        keys, values = self._read_back(tokens) if rows is None else self._whole(rows, query.dtype)
        latest = tokens[:2] if rows is None or rows.latest is None else rows.latest
        return self.attend_all(query, (keys, values), latest, start, mask, kwargs)

    def _read_back(self, tokens: NewTokens) -> tuple[Tensor, Tensor]:
        """What would be read of the new tokens, were there a cache; gradients pass."""
        keys, values = self.key_codec(tokens.keys), self.value_codec(tokens.values)
        if (first := tokens.first(None, 0, self.coded.first_tokens)) is None:
            return keys, values
        places = first.placed()
        return places.put(keys, 0, values=False), places.put(values, 0, values=True)

    def _cached(self, tokens: NewTokens, cache: Any) -> Rows:
        """Adds the new tokens to ``cache``; all that they see."""
        self.make_room(cache)
        keys, values = self.key_codec.encode(tokens.keys)[:, None], self.value_codec.encode(tokens.values)[:, None]
        make_fit(cache, self.layer_idx, keys, values)
        seen = int(cache.get_seq_length(self.layer_idx))
        _, offset = cache.get_mask_sizes(keys.shape[2], self.layer_idx)
        first: PlacedTokens | None
        (keys, values), (first, latest) = cache.update(keys, values, self.layer_idx, tokens)
        places = () if first is None else (first.placed(offset),)
        latest = None if latest is None else (latest[0][:, 0], latest[1][:, 0])
        return Rows(keys[:, 0], values[:, 0], places, seen - offset, latest)

    def _read(self, rows: Rows, start: int, stop: int, dtype: torch.dtype, *, values: bool) -> Tensor:
        """Coefficients [B,c,G d] of keys, or ``values``, of the columns from ``start`` to before ``stop``."""
        codec, held = (self.value_codec, rows.values) if values else (self.key_codec, rows.keys)
        states: Tensor = codec.decode(held[:, start:stop], dtype)
        for places in rows.places:
            states = places.put(states, start, values=values)
        return states

    def _whole(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients [B,S,G d] of all keys and values."""
        length = rows.keys.shape[1]
        return self._read(rows, 0, length, dtype, values=False), self._read(rows, 0, length, dtype, values=True)

    def _angles(self, columns: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin [..,t,P] of rope at ``columns`` [..,t], in the dtype of ``like``."""
        angles = columns[..., None].double() * self.inv_freq.view(torch.float32).double()
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _scaled(self, query: Tensor, positions: Tensor | None, start: int) -> Tensor:
        """The query [B,H,T,d] before rope, with what rope and the family put on it, or on it and keys, after rope.

        A gain of the turned query is one of it in the frame of its own position, whatever its column.
        """
        if self.coded.rope_scale != 1 and self.rope_pairs:
            scale = query.new_ones(self.head_dim)
            scale[: 2 * self.rope_pairs] = self.coded.rope_scale**2  # of queries and keys
            query = query * scale
        if self.query_gain is None:
            return query
        if positions is None:
            positions = torch.arange(start, start + query.shape[2], device=query.device)[None]
        cos, sin = self._angles(positions[:, None], query)
        return turned(turned(query, cos, sin) * self.query_gain, cos, -sin)

    def attend_all(
        self,
        query: Tensor,
        coded: tuple[Tensor, Tensor],
        latest: tuple[Tensor, Tensor],
        start: int,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Rebuilds keys and values from coefficients and calls the attention that the config names.

        Args:
            query: [B,H,T,d] before rope, its first token in column ``start``.
            coded: coefficients [B,S,G d] of keys and of values as they are read.
            latest: those of the last tokens [B,E,G d] as they were before coding, for an exact window.
            start: the column.
            mask: of the new tokens and all cached ones.
            kwargs: what else the layers of transformers give.

        Returns:
            The output [B,T,H,d] and the weights.
        """
        query, key, value = self.rebuilt(query, coded, start)
        return self.attend_as_stock(query, key, value, mask, kwargs)

    def rebuilt(
        self, query: Tensor, states: tuple[Tensor, Tensor], start: int, column: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries [B,H,T,d], turned keys and values [B,G,S,d] of coefficients [B,S,G d] from a column on."""
        columns = torch.arange(column, column + states[0].shape[1], device=query.device)
        key = self._rebuilt(states[0], self.key_decoder, self.key_width)
        value = self._rebuilt(states[1], self.value_decoder, self.value_width)
        own = torch.arange(start, start + query.shape[2], device=query.device)
        return turned(query, *self._angles(own, query)), turned(key, *self._angles(columns, query)), value

    def _rebuilt(self, states: Tensor, decoder: nn.Module | None, width: int) -> Tensor:
        """Heads [B,G,t,d] of coefficients [B,t,G d] in blocks of ``width``."""
        states = states if decoder is None else through(decoder, states, width)
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def reads_chunks(self, new: int, mask: Tensor | None) -> bool:
        """Whether the cache is read a chunk at a time: few new tokens, and a mask of single tokens or none."""
        if self.always_expands or self.training or new > FEW:
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def attend_few(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """Attention that holds no more than a chunk of the cache as numbers; returns [B,T,H,d]."""
        return self.attend_in_chunks(query, rows, self.shown(mask, query.shape[2], rows.keys.shape[1], query.device))

    def shown(self, mask: Tensor | None, new: int, length: int, device: Any) -> Tensor | None:
        """The mask, or the one that is meant where none is given."""
        if mask is None and new > 1 and self.is_causal:
            return causal_mask(new, length, self.sliding_window, device)
        return mask

    def attend_in_chunks(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """The same with the mask that is meant."""
        length = rows.keys.shape[1]
        mask = None if mask is None else additive_mask(mask, query.dtype)
        size = max(1, CHUNK // (len(query) * self.num_kv_heads * self.head_dim))
        chunks = [(start, min(length, start + size)) for start in range(0, length, size)]
        precise = query.to(torch.promote_types(query.dtype, torch.float32))  # of 16 bits products are slower, too
        scores = torch.cat(self._scores(precise * self.scaling, rows, chunks, query.dtype), dim=-1)
        weights = attention_weights(scores, mask, self.spec.softcap, self.sinks)
        return self._context(weights, rows, chunks, query.dtype).transpose(1, 2).to(query.dtype)

    def _scores(self, query: Tensor, rows: Rows, chunks: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
        """Scores [B,H,T,c] of each chunk; in it keys and queries are turned from its first column on.

        ``dtype``: of what is read, which prefill reads in the model's own.
        """
        starts = torch.tensor([start for start, _ in chunks], device=query.device)
        columns = rows.start + torch.arange(query.shape[2], device=query.device) - starts[:, None, None, None]
        queries = turned(query.expand(len(chunks), *query.shape), *self._angles(columns, query))
        tables = self._angles(torch.arange(chunks[0][1], device=query.device), query)
        product = (self._by_heads if self.channel_index is None else self._by_channels)(queries, *tables)
        read = (self._read(rows, *chunk, dtype, values=False).to(query.dtype) for chunk in chunks)
        return [product(index, states) for index, states in enumerate(read)]

    def _by_heads(self, queries: Tensor, cos: Tensor, sin: Tensor) -> Product:
        """Rebuilds keys; ``queries`` [chunks,B,H,T,d] turned, ``cos``, ``sin`` [c,P] of a chunk's columns."""
        decoder = None if self.key_decoder is None else matrix(self.key_decoder, self.key_width, cos)
        cos, sin = cos[:, None], sin[:, None]

        def product(index: int, states: Tensor) -> Tensor:
            keys = (states if decoder is None else mapped(states, *decoder)).unflatten(-1, (-1, self.head_dim))
            turn(keys, cos[: keys.shape[1]], sin[: keys.shape[1]])
            return grouped(queries[index], keys.permute(0, 2, 3, 1))

        return product

    def _by_channels(self, queries: Tensor, cos: Tensor, sin: Tensor) -> Product:
        """Takes a query to the channels of its block, for the decoder commutes with rope; the mean of keys turns, too.

        ``queries`` [chunks,B,H,T,d] turned, ``cos``, ``sin`` [c,P] of a chunk's columns.
        """
        weight, mean = self._by_head(self.key_decoder, self.key_width, cos)
        mean, turned_dims = mean.repeat_interleave(self.num_key_value_groups, dim=0)[:, None], 2 * self.rope_pairs
        real, imag = mean[..., :turned_dims].chunk(2, dim=-1)
        of_mean = multiply_pairs(queries[..., :turned_dims], real, -imag)  # the conjugate of what turns with a column
        of_rest = (queries[..., turned_dims:] * mean[..., turned_dims:]).sum(-1, keepdim=True)
        blocks = self.num_kv_heads * self.head_dim // self.key_width
        channels: Any = self.channel_index
        channel_cos, channel_sin = (table[:, channels].unflatten(-1, (blocks, -1)) for table in (cos, sin))
        waves = torch.cat([cos, sin], -1)

        def product(index: int, states: Tensor) -> Tensor:
            states, length = states.unflatten(-1, (blocks, -1)), states.shape[1]
            turn(states, channel_cos[:length], channel_sin[:length])
            absorbed = grouped(queries[index], weight[None]).unflatten(1, (blocks, -1)).flatten(2, 3)
            scores = (states.transpose(1, 2) @ absorbed.mT).mT.flatten(1, 2).unflatten(1, queries.shape[2:4])
            return scores + of_mean[index] @ waves[:length].mT + of_rest[index]

        return product

    def _context(self, weights: Tensor, rows: Rows, chunks: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
        """Values weighted with ``weights`` [B,H,T,S]: [B,H,T,d]."""
        read = ((slice(*chunk), self._read(rows, *chunk, dtype, values=True).to(weights.dtype)) for chunk in chunks)
        blocks = ((weights[..., at], states.unflatten(-1, (-1, self.value_width))) for at, states in read)
        context = torch.stack([grouped(part, states.transpose(1, 2)) for part, states in blocks]).sum(0)
        if self.value_decoder is None:
            return context
        weight, mean = self._by_head(self.value_decoder, self.value_width, weights)
        heads = grouped(context, weight.mT[None])
        mean = mean.repeat_interleave(self.num_key_value_groups, dim=0)
        return heads + weights.sum(-1, keepdim=True) * mean[:, None]  # a sink takes a part of the weights

    def _by_head(self, decoder: Any, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [G,d,w] and constant [G,d] of a decoder."""
        weight, mean = matrix(decoder, width, like)
        return weight.unflatten(0, (-1, self.head_dim)), mean.unflatten(0, (-1, self.head_dim))


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [..,t,n] whose first 2 m numbers are pairs, half-split, turned by the angle of cos and sin [..,t,m]."""
    size = 2 * cos.shape[-1]
    if not size:
        return states
    pairs, rest = states.split([size, states.shape[-1] - size], dim=-1)
    return torch.cat([multiply_pairs(pairs, cos, sin), rest], dim=-1)


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same in place."""
    size = cos.shape[-1]
    real, imag = states[..., :size], states[..., size : 2 * size]
    swapped = real * sin
    real.mul_(cos).addcmul_(imag, sin, value=-1)
    imag.mul_(cos).add_(swapped)

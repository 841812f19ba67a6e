"""Attention whose cache holds codes: a row of bytes for a token's keys, before rope, and one for its values.

One of the modelling files that travel with every converted checkpoint. It needs only torch and transformers. What
methods build (shapes as in torch.nn.Linear, weight [out,in]; n = G d):

    q_proj [H d,D], k_proj [n,D], v_proj [n,D], o_proj [D,H d], each with a bias; gate_proj, sinks, norms, query_gain as
    in LatentAttention. A head is [P real parts | P imaginary parts | rest].
    Coefficients z = (k - mean) E, of values likewise. In the basis "own" they are k itself: no encoder, no decoder.
    E is block diagonal: a block is b key/value heads (``key_block``, ``value_block``), w = b d coefficients. One block
    of all heads, in the basis "axes", may have fewer than n; m are all coefficients, n otherwise.
    If keys are linear in x, E and the mean are folded into k_proj [m,D]. Otherwise (LayerSpec.encodes_keys), norm and
    clip follow k_proj [n,D], and then key_encoder [n,w]: the blocks of E^T under each other, or [w,n] if there is one.
    Its bias is -mean E. value_encoder (LayerSpec.encodes_values) is the same for values.
    key_decoder, value_decoder [n,w]: the blocks of (E^-1)^T, or its substitute. The bias is the mean. Absent in "own".
    key_codec, value_codec, inv_freq: as in RowsAttention.
    channel_index [G P], int64, in the basis "channels" only: the rope pair with which a channel rotates. The
    coefficients of a block are [b P real parts | b P imaginary parts | b (d - 2 P) of dims without rope].

Shapes: B batch, T new tokens, S cached tokens, H query heads, G key/value heads, d head_dim, P rope pairs, c tokens of
a chunk, m blocks of w coefficients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .absorbed import additive_mask
from .attention import joined
from .block_maps import grouped, mapped_columns, matrix, through
from .c_decode import Keys, Softmax, Turning, Values, attend_in_c, tiles_of
from .c_rows import runs_in_c
from .heads import attention_weights, multiply_pairs
from .room import room_of_thread
from .rows_attention import Rows, RowsAttention, turn, turned
from .spec import LayerSpec


class Asked(NamedTuple):
    """Queries before rope, as they meet what is cached or the keys that are rebuilt of it, in g groups of heads."""

    query: Tensor  # [B,g,H/g,T,w]: a group meets w numbers of its own
    channels: Tensor  # [g,p], the rope pair with which each of the first p pairs of these numbers turns
    of_mean: Tensor | None = None  # [B,H,T,2 P], what meets cos and sin of a column, for the mean of keys
    constant: Tensor | None = None  # [B,H,T,1], what it adds to all scores
    decoder: tuple[Tensor, Tensor] | None = None  # weight and constant, if keys are rebuilt


class CodedAttention(RowsAttention):
    """Attention over a cache of codes that stands in for the attention module ``original`` of one layer."""

    channel_index: Tensor | None
    key_decoder: nn.Module | None
    value_decoder: nn.Module | None

    def _make_cached(self, hidden: int, spec: LayerSpec) -> None:
        size, coded = self.num_kv_heads * self.head_dim, spec.codes
        self.key_width, self.value_width = keys, values = coded.block_widths(self.spec)
        self.k_proj, self.key_encoder = _made(hidden, size, coded.keys.width, keys, spec.encodes_keys)
        self.v_proj, self.value_encoder = _made(hidden, size, coded.values.width, values, spec.encodes_values)
        self.key_decoder = None if coded.key_basis == "own" else nn.Linear(keys, size)
        self.value_decoder = None if coded.value_basis == "own" else nn.Linear(values, size)

    def _make_buffers(self, spec: LayerSpec) -> None:
        super()._make_buffers(spec)
        channels = torch.zeros(self.num_kv_heads * self.rope_pairs, dtype=torch.long)
        self.register_buffer("channel_index", channels if self.coded.key_basis == "channels" else None)

    def coefficients(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is coded of the new tokens: keys and values [B,T,m] in their bases."""
        linear_keys, linear_values = self.spec.linear_queries, self.spec.linear_values
        keys = self.k_proj(hidden_states) if linear_keys else joined(self.true_key(hidden_states))
        values = self.v_proj(hidden_states) if linear_values else joined(self.true_value(hidden_states))
        keys = keys if self.key_encoder is None else through(self.key_encoder, keys, self.key_encoder.in_features)
        if self.value_encoder is None:
            return keys, values
        return keys, through(self.value_encoder, values, self.value_encoder.in_features)

    def framed(self, query: Tensor, positions: Tensor | None, start: int) -> Tensor:
        """The query [B,H,T,d], with what rope and the family put on it, or on it and keys, after rope.

        A gain of the rotated query is a gain in the frame of its own position, whatever its column.
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
        """Rebuilds keys and values from coefficients and calls the attention that the config names."""
        query, key, value = self.rebuilt(query, coded, start)
        return self.attend_as_stock(query, key, value, mask, kwargs)

    def rebuilt(
        self, query: Tensor, states: tuple[Tensor, Tensor], start: int, column: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B,H,T,d], rotated keys and values [B,G,S,d] of coefficients [B,S,G d] from a column on."""
        columns = torch.arange(column, column + states[0].shape[1], device=query.device)
        key = self._rebuilt(states[0], self.key_decoder, self.key_width)
        value = self._rebuilt(states[1], self.value_decoder, self.value_width)
        own = torch.arange(start, start + query.shape[2], device=query.device)
        return turned(query, *self._angles(own, query)), turned(key, *self._angles(columns, query)), value

    def _rebuilt(self, states: Tensor, decoder: nn.Module | None, width: int) -> Tensor:
        """Heads [B,G,t,d] of coefficients [B,t,G d] in blocks of ``width``."""
        states = states if decoder is None else through(decoder, states, width)
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend_in_chunks(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """Attends to all chunks, which C or torch reads; returns [B,T,H,d]."""
        mask = None if mask is None else additive_mask(mask, query.dtype)
        precise = query.to(torch.promote_types(query.dtype, torch.float32)) * self.scaling  # 16 bits are slower, too
        asked = (self._of_keys if self.channel_index is None else self._of_channels)(precise)
        by_c = runs_in_c(precise, self.key_codec, self.value_codec)
        context, share = (self._by_c if by_c else self._by_torch)(asked, rows, mask, query.dtype)
        return self._values(context, share).transpose(1, 2).to(query.dtype)

    def _by_c(self, asked: Asked, rows: Rows, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients of values [B,H,T,w] in one pass over all rows, and the weight [B,H,T,1] that sinks leave."""
        query, of_mean = self._from_columns(asked, rows.start, rows.keys.new_zeros(1, dtype=torch.long))
        turning = self._kept.get(self.inv_freq, self._turning, tiles_of(rows.keys), query.shape[-1])
        if of_mean is not None:
            of_mean = of_mean[0].unflatten(1, (query.shape[2], -1)).flatten(2, 3)
        keys = Keys(self.key_codec, rows.keys, query[0], turning, of_mean, asked.decoder)
        values = Values(self.value_codec.width // self.value_width, self.value_codec, rows.values)
        new = asked.query.shape[3]
        softmax = Softmax(new, mask, asked.constant, self.spec.softcap, self.sinks)
        found = attend_in_c([keys], values, rows.places, dtype, softmax)
        context, share = (each.unflatten(1, (-1, new)) for each in found)
        return context, share.unsqueeze(-1)

    def _by_torch(self, asked: Asked, rows: Rows, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same. Reads the keys of all chunks for the scores, then the values."""
        scores = self._scores(asked, rows, dtype).unflatten(1, (-1, asked.query.shape[3]))
        scores = scores if asked.constant is None else scores + asked.constant
        weights = attention_weights(scores, mask, self.spec.softcap, self.sinks)
        return self._context(weights, rows, dtype), weights.sum(-1, keepdim=True)

    def _turning(self, tiles: int, width: int) -> Turning:
        """How the numbers of all groups turn, ``width`` of each."""
        rebuilt = self.channel_index is None and self.key_decoder is not None
        return self.turning_of(self._channels(), width, tiles, None if rebuilt else self.coded.keys)

    def _scores(self, asked: Asked, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Scores [B,H T,S] but for the constant. In each chunk keys and queries are turned from its first column on."""
        chunks, room, like = self.chunks(rows), room_of_thread(), asked.query
        size = chunks[0][1]
        starts = torch.arange(0, len(chunks) * size, size, device=like.device)
        queries, of_mean = self._from_columns(asked, rows.start, starts)
        waves = self._waves(size, like)
        if of_mean is not None:
            of_mean = (of_mean @ torch.cat(waves)).unflatten(2, (queries.shape[2], -1)).flatten(3, 4)
        cos, sin = (table[asked.channels] for table in waves)
        found = []
        for index, (start, stop) in enumerate(chunks):
            states, length = self._read(rows, start, stop, dtype, room, values=False).to(like.dtype).mT, stop - start
            keys = states if asked.decoder is None else mapped_columns(states, *asked.decoder)
            keys = keys.unflatten(1, (queries.shape[2], -1))
            turn(keys, cos[..., :length], sin[..., :length], room)
            scores = queries[index] @ keys
            found.append((scores if of_mean is None else scores.add_(of_mean[index, ..., :length])).flatten(1, 2))
        return torch.cat(found, -1)

    def _from_columns(self, asked: Asked, own: int, starts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [chunks,B,g,H T/g,w], the first of them in column ``own``, turned from the columns ``starts`` on.

        And what meets the mean of keys, [chunks,B,H,T,2 P].
        """
        columns = own + torch.arange(asked.query.shape[3], device=starts.device) - starts[:, None]
        turns = self._angles(columns, asked.query)  # [chunks,T,P]
        of_channels = (table[..., asked.channels].transpose(1, 2)[:, None, :, None] for table in turns)
        queries = turned(asked.query, *of_channels).flatten(3, 4)
        if asked.of_mean is None:
            return queries, None
        return queries, turned(asked.of_mean, *(table[:, None, None] for table in turns))

    def _of_keys(self, query: Tensor) -> Asked:
        """A query [B,H,T,d] meets the keys of its head, which are rebuilt."""
        decoder = None if self.key_decoder is None else matrix(self.key_decoder, self.key_width, query)
        return Asked(query.unflatten(1, (self.num_kv_heads, -1)), self._channels(), decoder=decoder)

    def _of_channels(self, query: Tensor) -> Asked:
        """A query meets the channels of its block, for the decoder commutes with rope; the mean of keys turns, too."""
        weight, mean = self._by_head(self.key_decoder, self.key_width, query)
        mean, turned_dims = mean.repeat_interleave(self.num_key_value_groups, dim=0)[:, None], 2 * self.rope_pairs
        real, imag = mean[..., :turned_dims].chunk(2, dim=-1)
        of_mean = multiply_pairs(query[..., :turned_dims], real, -imag)  # the conjugate of what turns with a column
        of_rest = (query[..., turned_dims:] * mean[..., turned_dims:]).sum(-1, keepdim=True)
        channels = self._channels()
        absorbed = grouped(query, weight[None]).unflatten(1, (len(channels), -1))
        return Asked(absorbed, channels, of_mean, of_rest if turned_dims < self.head_dim else None)

    def _channels(self) -> Tensor:
        """The rope pair [g,p] of each pair of what a group of queries meets: a block's channels, or keys of a head."""
        if self.channel_index is None:
            return torch.arange(self.rope_pairs, device=self.inv_freq.device).expand(self.num_kv_heads, -1)
        return self.channel_index.view(self.num_kv_heads * self.head_dim // self.key_width, -1)

    def _context(self, weights: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Coefficients of values weighted with ``weights`` [B,H,T,S]: [B,H,T,w]."""
        blocks = self.value_codec.width // self.value_width
        shares = weights.unflatten(1, (blocks, -1)).flatten(2, 3).flatten(0, 1)
        context = shares.new_zeros(*shares.shape[:2], self.value_width)
        for start, stop in self.chunks(rows):
            values = self._read(rows, start, stop, dtype, room_of_thread(), values=True).to(shares.dtype).mT
            context.baddbmm_(shares[..., start:stop], values.reshape(len(context), self.value_width, -1).mT)
        return context.view(*weights.shape[:3], -1)

    def _values(self, context: Tensor, share: Tensor) -> Tensor:
        """Heads [B,H,T,d] of weighted coefficients [B,H,T,w], whose weights have the sum ``share`` [B,H,T,1]."""
        if self.value_decoder is None:
            return context
        weight, mean = self._by_head(self.value_decoder, self.value_width, context)
        mean = mean.repeat_interleave(self.num_key_value_groups, dim=0)
        return grouped(context, weight.mT[None]) + share * mean[:, None]  # a sink takes a part of the weights

    def _by_head(self, decoder: Any, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [G,d,w] and constant [G,d] of a decoder."""
        weight, mean = matrix(decoder, width, like)
        return weight.unflatten(0, (-1, self.head_dim)), mean.unflatten(0, (-1, self.head_dim))


def _made(hidden: int, size: int, coefficients: int, width: int, encodes: bool) -> tuple[nn.Linear, nn.Linear | None]:
    """What makes ``coefficients``, in blocks of ``width``, of x: a projection, and an encoder after it."""
    if not encodes:
        return nn.Linear(hidden, coefficients), None
    encoder = nn.Linear(size, width) if width == coefficients else nn.Linear(width, size)
    return nn.Linear(hidden, size), encoder

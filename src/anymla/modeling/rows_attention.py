"""What every attention does whose cache holds rows of bytes: codes of what is cached, read a chunk at a time.

One of the modelling files that travel with every converted checkpoint. It needs only torch and transformers.

A layer caches two vectors of coefficients per token, each as a row of bytes. They are keys before rope and values, or a
latent and a rope key before rope. A cached token's position is its column, because
scores depend only on differences of positions.

Shapes: B batch, T new tokens, S cached tokens, H query heads, d head_dim, P rope pairs, n coefficients of a token, c
tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import make_fit
from .attention import ConvertedAttention
from .c_decode import Turning
from .c_library import TILE
from .c_rows import encoded, not_zero_turned
from .codec import Kept
from .codecs import make_codec
from .coded_cache import make_room
from .coding_spec import CodedSpec, Coding
from .heads import causal_mask, multiply_pairs, score_bias
from .placed_tokens import NewTokens, PlacedTokens, Places, Run
from .room import Room
from .spec import LayerSpec

CHUNK = 1 << 19  # numbers that are read at a time in decode: more leave a CPU's caches, fewer cost more calls
FEW = 16  # new tokens up to which the cache is read in chunks


class Rows(NamedTuple):
    """What the new tokens see: rows of bytes [B,S,row_bytes], and what belongs in some columns instead."""

    keys: Tensor
    values: Tensor
    places: tuple[Places | Run, ...]
    start: int  # the column of the first new token
    latest: tuple[Tensor, Tensor] | None = None  # coefficients [B,E,n] of the last tokens, for an exact window
    first: PlacedTokens | None = None  # the exact first tokens, by sequence; a column below zero is no token

    def before(self, stop: int) -> Rows:
        """Those in the columns before ``stop``."""
        return self._replace(keys=self.keys[:, :stop], values=self.values[:, :stop])


class RowsAttention(ConvertedAttention):
    """Attention over a cache of codes.

    key_codec, value_codec: make_codec of the spec's codings, with their buffers. inv_freq [P], int32: the bits of
    float32 numbers, which a cast of the model must not round: the angle by which a pair turns per position, negative
    where the family turns backwards.
    """

    inv_freq: Tensor
    coded: CodedSpec

    def _make_buffers(self, spec: LayerSpec) -> None:
        self.make_codes(spec)

    def make_codes(self, spec: LayerSpec) -> None:
        """Makes the codecs of ``spec``, and room for the angles of rope."""
        self.coded = spec.codes
        self.key_codec, self.value_codec = make_codec(self.coded.keys), make_codec(self.coded.values)
        self.register_buffer("inv_freq", torch.zeros(self.rope_pairs, dtype=torch.int32))
        self._kept = Kept()

    def coefficients(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is coded of the new tokens, in both rows: [B,T,n] each."""
        raise NotImplementedError

    def framed(self, query: Tensor, positions: Tensor | None, start: int) -> Tensor:
        """The query [B,H,T,d] before rope as it is turned by its column later, ``start`` for the first.

        ``positions`` [B or 1,T]: None where the family does not say them.
        """
        raise NotImplementedError

    def attend_all(
        self,
        query: Tensor,
        coded: tuple[Tensor, Tensor],
        latest: tuple[Tensor, Tensor],
        start: int,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to all coefficients at once.

        Args:
            query: as ``framed``, its first token in column ``start``.
            coded: coefficients [B,S,n] of both rows as they are read.
            latest: those of the last tokens [B,E,n] as they were before coding, for an exact window.
            start: the column.
            mask: of the new tokens and all cached ones.
            kwargs: what else the layers of transformers give.

        Returns:
            The output [B,T,H,d] and the weights.
        """
        raise NotImplementedError

    def attend_in_chunks(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """Attends to ``rows`` and holds no more than a chunk of them as numbers; ``mask`` is the one that is meant."""
        raise NotImplementedError

    def make_room(self, cache: Any) -> Any:
        """Gives ``cache`` room for the rows of this layer."""
        return make_room(cache, self.layer_idx, self.coded.first_tokens, self.coded.exact_window)

    def places(self, position_embeddings: Any, position_ids: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """The positions [B or 1,T], where the family says them."""
        return position_ids if position_ids is None or position_ids.dim() == 2 else position_ids[0]

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
            stop = start + query.shape[2]  # a static cache has empty rows after them
            rows, mask = rows.before(stop), mask if mask is None else mask[..., :stop]
        query = self.framed(query, places, start)
        if rows is not None and self.reads_chunks(query.shape[2], mask):
            return self.attend_few(query, rows, mask), None
        keys, values = self._read_back(tokens) if rows is None else self._whole(rows, query.dtype)
        latest = tokens[:2] if rows is None or rows.latest is None else rows.latest
        return self.attend_all(query, (keys, values), latest, start, mask, kwargs)

    def _read_back(self, tokens: NewTokens) -> tuple[Tensor, Tensor]:
        """What would be read of the new tokens, were there a cache; gradients pass."""
        keys, values = self.key_codec(tokens.keys), self.value_codec(tokens.values)
        if not self.coded.first_tokens:
            return keys, values
        exact = tokens.early(self.coded.first_tokens)[..., None]
        return tokens.keys.where(exact, keys), tokens.values.where(exact, values)

    def _cached(self, tokens: NewTokens, cache: Any) -> Rows:
        """Adds the new tokens to ``cache``; all that they see."""
        self.make_room(cache)
        sides = ((self.key_codec, tokens.keys), (self.value_codec, tokens.values))
        keys, values = (encoded(codec, states)[:, None] for codec, states in sides)
        make_fit(cache, self.layer_idx, keys, values)
        seen = int(cache.get_seq_length(self.layer_idx))
        _, offset = cache.get_mask_sizes(keys.shape[2], self.layer_idx)
        first: PlacedTokens | None
        (keys, values), (first, latest) = cache.update(keys, values, self.layer_idx, tokens)
        places = () if first is None else (first.places.shifted(offset),)
        latest = None if latest is None else (latest[0][:, 0], latest[1][:, 0])
        first = None if first is None else first._replace(columns=first.columns - offset)
        return Rows(keys[:, 0], values[:, 0], places, seen - offset, latest, first)

    def _read(self, rows: Rows, start: int, stop: int, dtype: torch.dtype, room: Room, *, values: bool) -> Tensor:
        """Coefficients [B,c,G d] of keys, or ``values``, of the columns from ``start`` to before ``stop``.

        They are numbers of ``dtype``, in float32 or finer. Tokens lie side by side in memory.
        """
        codec, held = (self.value_codec, rows.values) if values else (self.key_codec, rows.keys)
        states: Tensor = codec.read(held[:, start:stop], dtype, room).to(torch.promote_types(dtype, torch.float32))
        for places in rows.places:
            places.put(states, start, values=values)
        return states

    def _whole(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients [B,S,G d] of all keys and values."""
        length = rows.keys.shape[1]
        keys, values = (self._read(rows, 0, length, dtype, Room(), values=values) for values in (False, True))
        return keys.to(dtype), values.to(dtype)

    def _angles(self, columns: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin [..,t,P] of rope at ``columns`` [..,t], in the dtype of ``like``."""
        angles = columns[..., None].double() * self.inv_freq.view(torch.float32).double()
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _waves(self, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin [P,size] of rope in the first columns, in the dtype of ``like``."""
        made = 1 << (size - 1).bit_length()  # a growing cache makes few tables
        cos, sin = self._kept.get(self.inv_freq, self._made_waves, made, like.dtype)
        return cos[:, :size], sin[:, :size]

    def _made_waves(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        columns = torch.arange(size, device=self.inv_freq.device)
        cos, sin = self._angles(columns, torch.empty(0, dtype=dtype))
        return cos.T.contiguous(), sin.T.contiguous()

    def turning_of(self, channels: Tensor, width: int, tiles: int, coding: Coding | None) -> Turning:
        """How C turns numbers, for so many tiles.

        Args:
            channels: [g,p], the rope pairs of the first p pairs of each group.
            width: numbers of a group.
            tiles: most tiles of columns.
            coding: of these numbers; None if they are keys that are rebuilt of coefficients.
        """
        like, (groups, count) = torch.empty(0), channels.shape
        real = torch.arange(0, groups * width, width)[:, None] + torch.arange(count)
        pairs = torch.stack([real.flatten(), real.flatten() + count, channels.flatten()]).int()
        starts = torch.stack(self._angles(torch.arange(0, tiles * TILE, TILE), like), 1)
        used = None if coding is None else not_zero_turned(coding, pairs)
        return Turning(pairs, torch.stack(self._waves(TILE, like)), starts, used)

    def reads_chunks(self, new: int, mask: Tensor | None) -> bool:
        """Whether the cache is read a chunk at a time: few new tokens, and a mask of single tokens or none."""
        if self.always_expands or self.training or new > FEW:
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def attend_few(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """Attention that holds no more than a chunk of the cache as numbers; returns [B,T,H,d]."""
        return self.attend_in_chunks(query, rows, self.shown(mask, query.shape[2], rows.keys.shape[1], query.device))

    def chunks(self, rows: Rows) -> list[tuple[int, int]]:
        """First column of every chunk, and the one after its last."""
        batch, length = rows.keys.shape[:2]
        size = max(1, CHUNK // (batch * max(self.key_codec.width, self.value_codec.width)))
        return [(start, min(length, start + size)) for start in range(0, length, size)]

    def shown(self, mask: Tensor | None, new: int, length: int, device: Any) -> Tensor | None:
        """The mask, or the one that is meant where none is given."""
        if mask is None and new > 1 and self.is_causal:
            return causal_mask(new, length, self.sliding_window, device)
        return mask


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [..,t,n] whose first 2 m numbers are pairs, half-split, turned by the angle of cos and sin [..,t,m]."""
    pairs = multiply_pairs(states[..., : 2 * cos.shape[-1]], cos, sin)
    return torch.cat([pairs, states[..., pairs.shape[-1] :].expand(*pairs.shape[:-1], -1)], dim=-1)


def turn(states: Tensor, cos: Tensor, sin: Tensor, room: Room) -> None:
    """The same in place, of states [..,n,t] and tables [..,m,t]; ``room``: for what is made on the way."""
    size = cos.shape[-2]
    real, imag = states[..., :size, :], states[..., size : 2 * size, :]
    swapped = room.product(real, sin)
    real.mul_(cos).addcmul_(imag, sin, value=-1)
    imag.mul_(cos).add_(swapped)

"""Latent attention whose cache holds codes: a row of bytes for the latent, and one for the rope key before rope.

One of the modelling files that travel with every converted checkpoint; it needs torch and transformers only. Its
parameters and buffers are those of LatentAttention, or MfaAttention, and of RowsAttention. Rope channels are turned
when they are read.

Shapes: B batch, T new tokens, S cached tokens, H query heads, d head_dim, P rope pairs, r latent rank, R rope dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .absorbed import absorbed_attention, additive_mask
from .c_decode import Keys, Softmax, Turning, Values, attend_in_c, tiles_of
from .c_rows import runs_in_c
from .decode_kernel import codes_for_kernel
from .latent_attention import LatentAttention
from .mfa_attention import MfaAttention
from .placed_tokens import PlacedTokens
from .room import Room, room_of_thread
from .rows_attention import Rows, RowsAttention, turn
from .spec import LayerSpec


class CodedLatentAttention(RowsAttention, LatentAttention):  # type: ignore[misc]
    """Latent attention over codes; few new tokens read them a chunk at a time and never expand them."""

    def _make_buffers(self, spec: LayerSpec) -> None:
        LatentAttention._make_buffers(self, spec)
        self.make_codes(spec)

    def coefficients(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is coded of the new tokens: latent [B,T,r] and rope key [B,T,R] before rope."""
        return self.encoded(hidden_states)

    def framed(self, query: Tensor, positions: Tensor | None, start: int) -> Tensor:
        """Position-free query and channel query before rope, as one [B,H,T,d+R].

        A gain of the rotated query is a gain in the frame of its own position, whatever its column.
        """
        if self.query_gain is None:
            query_nope, channels = self.queries(query)
        else:
            columns = torch.arange(start, start + query.shape[2], device=query.device)[None]
            cos, sin = self._angles((columns if positions is None else positions)[:, None], query)
            query_nope, channels = self.queries(query, cos, sin)
            channels = self.rotated_channels(channels, cos, -sin)
        return torch.cat([query_nope, channels * self.coded.rope_scale**2], dim=-1)  # of queries and keys

    def attend_all(
        self,
        query: Tensor,
        coded: tuple[Tensor, Tensor],
        latest: tuple[Tensor, Tensor],
        start: int,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Turns the rope key and attends as LatentAttention does."""
        query_nope, channels = self._parts(query)
        own = torch.arange(start, start + query.shape[2], device=query.device)
        columns = torch.arange(coded[0].shape[1], device=query.device)
        query_rope = self.rotated_channels(channels, *self._angles(own, query))
        latent, rope_key = (states.unsqueeze(1) for states in coded)
        rope_key = self.rotated_channels(rope_key, *self._angles(columns, query))
        return self.attend_cached(query_nope, query_rope, latent, rope_key, mask, kwargs)

    def attend_in_chunks(self, query: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        """Attends to parts of the cache and weighs each with its share of the one softmax; returns [B,T,H,d].

        The parts are chunks, or what a kernel reads and the exact first tokens.
        """
        dtype, sides = query.dtype, ((self.key_codec, rows.keys), (self.value_codec, rows.values))
        codes = None if self.layer_spec.latent is None else codes_for_kernel(query, *sides)
        precise = query if codes else query.to(torch.promote_types(dtype, torch.float32))  # on a CPU faster, too
        if (up := self.up_projections(precise)) is None:
            return self.attend_all(query, whole := self._whole(rows, dtype), whole, rows.start, mask, {})[0]
        (query_nope, channels), (up_key, up_value) = self._parts(precise), (part.to(precise.dtype) for part in up)
        inputs = (self.into_latent(query_nope, up_key), channels, rows, mask)
        if codes is None and runs_in_c(precise, *(codec for codec, _ in sides if codec.width)):
            context = self._by_c(*inputs, dtype)
            return self.out_of_latent(context, up_value).transpose(1, 2).to(dtype)
        parts = self._by_kernel(*inputs, codes) if codes else self._by_chunks(*inputs, dtype)
        totals = torch.stack([total for _, total in parts])
        contexts = torch.stack([context.to(totals.dtype) for context, _ in parts])
        context = (contexts * self._shares(totals).unsqueeze(-1)).sum(0).to(precise.dtype)
        return self.out_of_latent(context, up_value).transpose(1, 2).to(dtype)

    def _by_c(
        self, query_latent: Tensor, channels: Tensor, rows: Rows, mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Attention to everything at once, [B,H,T,r]; C reads each row once, a tile at a time."""
        latent, ropes, new = self.key_codec.width, self.value_codec.width, query_latent.shape[2]
        own = rows.start + torch.arange(new, device=channels.device)
        query_rope = self.rotated_channels(channels, *self._angles(own, channels))
        key, value = self.key_and_value(torch.arange(latent).view(1, 1, 1, -1))
        query = query_latent
        if key is not value:  # parts of the latent
            query = query_latent.new_zeros(*query_latent.shape[:3], latent)
            query[..., key.flatten()] = query_latent
        sides = [(self.key_codec, rows.keys, query, 0)]
        sides += [(self.value_codec, rows.values, query_rope, ropes // 2)] if ropes else []
        keys = []
        for codec, held, asked, pairs in sides:
            turning = self._kept.get(self.inv_freq, self._turning, tiles_of(held), pairs)
            of_heads = (asked * self.scaling).flatten(1, 2)[:, None]
            keys.append(Keys(codec, held, of_heads, turning, second=pairs > 0))
        mask = None if mask is None else additive_mask(mask, dtype)
        softmax = Softmax(new, mask, softcap=self.spec.softcap, sinks=self.sinks)
        context, _ = attend_in_c(keys, Values(1), rows.places, dtype, softmax)
        context = context.unflatten(1, (-1, new))
        return context if key is value else context[..., value.flatten()]

    def _turning(self, tiles: int, pairs: int) -> Turning:
        """How C turns the rope key, of ``pairs``; a latent, which has none, does not turn."""
        coding = self.coded.values if pairs else self.coded.keys
        return self.turning_of(self.channel_frequency[None, :pairs], coding.width, tiles, coding)

    def _by_chunks(
        self, query_latent: Tensor, channels: Tensor, rows: Rows, mask: Tensor | None, dtype: torch.dtype
    ) -> list[Any]:
        """Attention to each chunk, read in ``dtype``, and the logarithm of its softmax's sum."""
        chunks = self.chunks(rows)
        cos, sin = (table[self.channel_frequency] for table in self._waves(chunks[0][1], channels))
        rooms = room_of_thread(), Room()  # a latent and its rope key are read together
        own = rows.start + torch.arange(channels.shape[2], device=channels.device)
        parts: list[Any] = []
        for start, stop in chunks:  # keys and queries are turned from a chunk's first column on
            latent, rope_key = (
                self._read(rows, start, stop, dtype, room, values=values).to(channels.dtype).unsqueeze(1)
                for room, values in zip(rooms, (False, True), strict=True)
            )
            turn(rope_key.mT, cos[:, : stop - start], sin[:, : stop - start], rooms[0])
            query_rope = self.rotated_channels(channels, *self._angles(own - start, channels))
            seen = None if mask is None else mask[..., start:stop]
            key, value = self.key_and_value(latent)
            inputs = (query_latent, query_rope, key, rope_key, seen, self.scaling)
            parts.append(absorbed_attention(*inputs, value=value, softcap=self.spec.softcap, summed=True))
        return parts

    def _by_kernel(
        self, query_latent: Tensor, channels: Tensor, rows: Rows, mask: Tensor | None, codes: tuple[Any, ...]
    ) -> list[Any]:
        """The same of all codes at once, and of the exact first tokens, whose columns the kernel leaves out."""
        from .triton_decode import Turns, attend, tile_tokens  # Triton is loaded only where it is used

        precise, length, device = channels.float(), rows.keys.shape[1], channels.device
        own = rows.start + torch.arange(channels.shape[2], device=device)
        query_rope = self.rotated_channels(precise, *self._angles(own, precise))
        tile = tile_tokens(query_latent.shape[-1], query_latent.dtype)
        columns = torch.arange(0, length, tile, device=device), torch.arange(tile, device=device)
        angles = [table for each in columns for table in self._angles(each, precise)]
        turns = Turns(*(table[:, self.channel_frequency].contiguous() for table in angles))
        first, softcap = rows.first, self.spec.softcap
        left_out, inputs = None if first is None else first.columns, (query_latent, query_rope)
        latent, rope_key = codes
        options: dict[str, Any] = {"softcap": softcap, "turns": turns, "left_out": left_out}
        parts = [attend(*inputs, latent, rope_key, mask, self.scaling, **options)]
        return parts if first is None else [*parts, self._of_first(*inputs, first, mask)]

    def _of_first(self, query_latent: Tensor, query_rope: Tensor, first: PlacedTokens, mask: Tensor | None) -> Any:
        """Attention to exact first tokens, with queries that are turned by their own positions."""
        known = first.columns[:, None, None]
        rope_key = self.rotated_channels(first.values.float()[:, None], *self._angles(known[:, 0], query_rope))
        seen = additive_mask(known >= 0, torch.float32)
        if mask is not None:
            index = known.clamp(min=0).expand(-1, *mask.shape[1:3], -1)
            given = additive_mask(mask, torch.float32).expand(len(known), -1, -1, -1)
            seen = seen + given.gather(-1, index)
        inputs = (query_latent.float(), query_rope, first.keys.float()[:, None], rope_key, seen, self.scaling)
        return absorbed_attention(*inputs, softcap=self.spec.softcap, summed=True)

    def _shares(self, totals: Tensor) -> Tensor:
        """Each chunk's part of the softmax, of the logarithms of their sums [chunks,B,H,T]; a sink takes one, too."""
        if self.sinks is None:
            return totals.softmax(0)
        sinks = self.sinks.to(totals.dtype)[None, :, None].expand_as(totals[0])
        return torch.cat([totals, sinks[None]]).softmax(0)[:-1]

    def _parts(self, query: Tensor) -> list[Tensor]:
        """Position-free query [B,H,T,d] and channel query [B,H,T,R]."""
        return list(query.tensor_split([query.shape[-1] - self.qk_rope_head_dim], dim=-1))


class CodedMfaAttention(CodedLatentAttention, MfaAttention):  # type: ignore[misc]
    """Factorised attention over codes of its latent and its rope key."""

    def _make_buffers(self, spec: LayerSpec) -> None:
        MfaAttention._make_buffers(self, spec)
        self.make_codes(spec)

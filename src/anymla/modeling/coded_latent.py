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

from .absorbed import absorbed_attention
from .latent_attention import LatentAttention
from .mfa_attention import MfaAttention
from .rows_attention import Rows, RowsAttention
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
        columns = torch.arange(start, start + query.shape[2], device=query.device)[None]
        if self.query_gain is None:
            positions = torch.zeros_like(columns)
        cos, sin = self._angles((columns if positions is None else positions)[:, None], query)
        query_nope, channels = self.queries(query, cos, sin)
        channels = self.rotated_channels(channels, cos, -sin) * self.coded.rope_scale**2  # of queries and keys
        return torch.cat([query_nope, channels], dim=-1)

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
        """Attends to one chunk after the other and weighs each with its share of the one softmax; [B,T,H,d]."""
        dtype = query.dtype
        precise = query.to(torch.promote_types(dtype, torch.float32))  # of 16 bits products are slower, too
        if (up := self.up_projections(precise)) is None:
            return self.attend_all(query, whole := self._whole(rows, dtype), whole, rows.start, mask, {})[0]
        (query_nope, channels), (up_key, up_value) = self._parts(precise), (part.to(precise.dtype) for part in up)
        query_latent, chunks = self.into_latent(query_nope, up_key), self.chunks(rows)
        tables = self._angles(torch.arange(chunks[0][1], device=query.device), precise)
        own = rows.start + torch.arange(query.shape[2], device=query.device)
        parts: list[Any] = []
        for start, stop in chunks:  # keys and queries are turned from a chunk's first column on
            latent, rope_key = (
                self._read(rows, start, stop, dtype, values=values).to(precise.dtype).unsqueeze(1)
                for values in (False, True)
            )
            rope_key = self.rotated_channels(rope_key, *(table[: stop - start] for table in tables))
            query_rope = self.rotated_channels(channels, *self._angles(own - start, precise))
            seen = None if mask is None else mask[..., start:stop]
            key, value = self.key_and_value(latent)
            inputs = (query_latent, query_rope, key, rope_key, seen, self.scaling)
            parts.append(absorbed_attention(*inputs, value=value, softcap=self.spec.softcap, summed=True))
        contexts, totals = (torch.stack(part) for part in zip(*parts, strict=True))
        context = (contexts * self._shares(totals).unsqueeze(-1)).sum(0)
        return self.out_of_latent(context, up_value).transpose(1, 2).to(dtype)

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

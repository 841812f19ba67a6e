"""Tokens whose coefficients are kept as they were before coding, and where they belong among the coded ones.

One of the modelling files that travel with every converted checkpoint; it needs torch only. A CPU that asks a GPU for
a number waits for all that the GPU has to do. So places are asked for once, and not for each new token.

Shapes: B batch, T new tokens, F exact first tokens, w tokens of a window, c columns of a chunk, n coefficients.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Tokens(NamedTuple):
    keys: Tensor
    values: Tensor
    columns: Tensor


class PlacedTokens(_Tokens):
    """Coefficients of some tokens [B,F,n] as they were before coding, and their columns [B,F] in the cache.

    A column is the number of a token in its sequence, padding included; -1 where a sequence has fewer such tokens.
    """

    def each(self, change: Callable[[Tensor], Tensor]) -> PlacedTokens:
        """The same with every tensor changed."""
        return PlacedTokens(*(change(tensor) for tensor in self))

    def moved(self, change: Callable[[Tensor], Tensor]) -> PlacedTokens:
        """The same on another device; their places are known there as well."""
        made = self.each(change)
        if "places" in vars(self):
            vars(made)["places"] = self.places.each(change)
        return made

    def last(self, count: int) -> PlacedTokens:
        """The ``count`` tokens of each sequence with the largest columns."""
        columns, index = self.columns.topk(min(count, self.columns.shape[1]), dim=1)
        index = index[..., None]
        keys, values = (states.gather(1, index.expand(-1, -1, states.shape[-1])) for states in self[:2])
        return PlacedTokens(keys, values, columns)

    @functools.cached_property
    def places(self) -> Places:
        """Where they belong. The CPU waits for a GPU here, and so this is made once and kept."""
        row, token = (self.columns >= 0).nonzero(as_tuple=True)
        order = self.columns[row, token].argsort(stable=True)
        row, token = row[order], token[order]
        columns = self.columns[row, token]
        return Places(self.keys[row, token], self.values[row, token], row, columns, columns.tolist())


class Places(NamedTuple):
    """Coefficients [m,n] of keys and of values that belong in ``column`` [m] of sequence ``row`` [m]."""

    keys: Tensor
    values: Tensor
    row: Tensor
    column: Tensor
    known: list[int]  # the columns, rising: the CPU looks up what lies in a chunk, and waits for no GPU

    def each(self, change: Callable[[Tensor], Tensor]) -> Places:
        """The same with every tensor changed."""
        keys, values, row, column = (change(tensor) for tensor in self[:4])
        return Places(keys, values, row, column, self.known)

    def shifted(self, columns: int) -> Places:
        """The same for rows that begin so many ``columns`` later."""
        if not columns:
            return self
        return self._replace(column=self.column - columns, known=[each - columns for each in self.known])

    def put(self, states: Tensor, start: int, *, values: bool) -> None:
        """Puts those of these tokens into ``states`` [B,c,n], keys or ``values`` of columns from ``start`` on."""
        first, stop = (bisect_left(self.known, column) for column in (start, start + states.shape[1]))
        if first < stop:
            exact = (self.values if values else self.keys)[first:stop]
            places = (self.row[first:stop], self.column[first:stop] - start)
            states.index_put_(places, exact.to(states.dtype))


class Run(NamedTuple):
    """Coefficients [B,w,n] of keys and of values that belong in the columns from ``first`` on, in every sequence."""

    keys: Tensor
    values: Tensor
    first: int

    def put(self, states: Tensor, start: int, *, values: bool) -> None:
        """As ``Places`` does."""
        exact = self.values if values else self.keys
        begin, stop = max(start, self.first), min(start + states.shape[1], self.first + exact.shape[1])
        if begin < stop:
            states[:, begin - start : stop - start] = exact[:, begin - self.first : stop - self.first]


class NewTokens(NamedTuple):
    """Coefficients of keys and values [B,T,n], and where the family says so the positions [B or 1,T], of new tokens."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None

    def early(self, count: int) -> Tensor:
        """Which of them [B or 1,T] are the exact first tokens of a sequence that begins with them."""
        if self.positions is None:
            return torch.arange(self.keys.shape[1], device=self.keys.device)[None] < count
        early = self.positions < count
        return early & (early.flip(1).cumsum(1).flip(1) <= count)

    def settle(self, count: int) -> bool:
        """Whether no later token has a position below ``count``, if positions grow."""
        return self.positions is not None and bool((self.positions[:, -1] >= count - 1).all())

    def first(self, held: PlacedTokens | None, start: int, count: int) -> PlacedTokens | None:
        """The exact first tokens once these were read, which begin at column ``start``; ``held``: those of before.

        The last ``count`` tokens with a position below ``count``: padding on the left may have small ones, too.
        """
        batch, new = self.keys.shape[:2]
        if self.positions is None:
            found = self._early(slice(0, max(0, count - start)), start)
            if not found.columns.shape[1]:
                return held
        else:
            early = self.positions < count
            if not early.any():
                return held
            columns = torch.arange(start, start + new, device=early.device).where(early, -1).expand(batch, -1)
            found = PlacedTokens(self.keys, self.values, columns).last(count)
        if held is None:
            return found
        return PlacedTokens(*(torch.cat(pair, dim=1) for pair in zip(held, found, strict=True))).last(count)

    def _early(self, tokens: slice, start: int) -> PlacedTokens:
        keys, values = self.keys[:, tokens].clone(), self.values[:, tokens].clone()
        columns = torch.arange(start, start + keys.shape[1], device=keys.device).expand(len(keys), -1)
        return PlacedTokens(keys, values, columns)

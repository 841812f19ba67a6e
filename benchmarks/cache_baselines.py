"""Cache codecs of other systems: what they leave of keys and values, which tokens stay exact, and the bits of both.

Shapes: B windows, T tokens, G key/value heads, d head_dim, C = G d, N calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from care import water_fill
from torch import Tensor

NUMBER_BITS = 16  # of an exact number, a scale, a zero point
SAMPLE = 4096  # calibration tokens that tables are fitted on
Pair = tuple[Tensor, Tensor]  # of keys and of values


@dataclass
class Codec:
    """What a system keeps of keys and values [B,T,C]; this one keeps all.

    ``first``: tokens at the start of a sequence that stay exact. ``recent``: latest tokens that do. ``before_rope``:
    whether keys are coded before they are rotated.
    """

    first: int = 0
    recent: int = 0
    before_rope: bool = True

    def fit(self, samples: list[Pair]) -> None:
        """Learns from every layer's keys and values [N,C]."""

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """What is read of keys and values that are no longer exact."""
        return keys, values

    def is_exact(self, length: int) -> tuple[Tensor, Tensor]:
        """Whether a query reads a token's key, and its value, exactly; [T,T] each."""
        query, token = torch.arange(length)[:, None], torch.arange(length)
        exact = (token < self.first) | (token > query - max(1, self.recent))
        return exact, exact

    def code_bits(self, width: int) -> float:
        """Bits of one token's keys and values in one layer, of which each are ``width`` numbers; codes and scales."""
        return 2 * width * NUMBER_BITS

    def exact_tokens(self) -> float:
        """Tokens, in the mean over keys and values, that are held exactly in place of codes."""
        return self.first + self.recent


def levels_of(samples: Tensor, bits: int, rounds: int = 8) -> Tensor:
    """Lloyd's levels [C, 2^bits] of each column of ``samples`` [N,C], in ascending order."""
    count, columns = 2**bits, samples[:SAMPLE].T.contiguous()
    levels = torch.quantile(columns, torch.linspace(0.5 / count, 1 - 0.5 / count, count), dim=1).T.contiguous()
    for _ in range(rounds):
        nearest = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, columns)
        sums = torch.zeros_like(levels).scatter_add_(1, nearest, columns)
        found = torch.zeros_like(levels).scatter_add_(1, nearest, torch.ones_like(columns))
        levels = torch.where(found > 0, sums / found.clamp_min(1), levels).sort(1).values
    return levels


def nearest_level(numbers: Tensor, levels: Tensor) -> Tensor:
    """Numbers [...,C], each replaced by its column's nearest level."""
    columns = numbers.flatten(0, -2).T.contiguous()
    codes = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, columns)
    return levels.gather(1, codes).T.reshape(numbers.shape)


def on_grid(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [...,n] on a grid between the least and the largest of the last axis."""
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    step = (high - low).clamp_min(1e-9) / (2**bits - 1)
    return ((numbers - low) / step).round() * step + low


@dataclass
class Tables(Codec):
    """Static non-uniform levels per channel: KVQuant without outliers and Fisher weights."""

    first: int = 4
    key_bits: int = 4
    value_bits: int = 4
    levels: list[Pair] = field(default_factory=list)

    def fit(self, samples: list[Pair]) -> None:
        self.levels = [(levels_of(keys, self.key_bits), levels_of(values, self.value_bits)) for keys, values in samples]

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        key_levels, value_levels = self.levels[layer]
        return nearest_level(keys, key_levels), nearest_level(values, value_levels)

    def code_bits(self, width: int) -> float:
        return width * (self.key_bits + self.value_bits)


@dataclass
class Kivi(Codec):
    """KIVI (arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups of channels.

    Keys leave the exact window a whole group at a time. As published, keys are coded after rope and no first token is
    exact. ``group`` is also the window's length.
    """

    before_rope: bool = False
    bits: int = 4
    group: int = 32

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        grouped = keys.unflatten(1, (-1, self.group)).transpose(2, 3)
        keys = on_grid(grouped, self.bits).transpose(2, 3).flatten(1, 2)
        return keys, on_grid(values.unflatten(-1, (-1, self.group)), self.bits).flatten(-2)

    def is_exact(self, length: int) -> tuple[Tensor, Tensor]:
        query, token = torch.arange(length)[:, None], torch.arange(length)
        return token >= query // self.group * self.group, token > query - self.group

    def code_bits(self, width: int) -> float:
        return 2 * width * (self.bits + 2 * NUMBER_BITS / self.group)

    def exact_tokens(self) -> float:
        return (self.group / 2 + self.group) / 2  # of keys half a group in the mean, of values a whole one


@dataclass
class HadamardInt(Codec):
    """Integers per token and head after a Hadamard rotation of the head, as engines with an int4 cache do."""

    before_rope: bool = False
    bits: int = 4
    head_dim: int = 64

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        turn = hadamard(self.head_dim)
        turned = [states.unflatten(-1, (-1, self.head_dim)) @ turn for states in (keys, values)]
        blocks = [states.flatten(-2).unflatten(-1, (-1, self.block(keys.shape[-1]))) for states in turned]
        coded = [on_grid(states, self.bits).flatten(-2).unflatten(-1, (-1, self.head_dim)) for states in blocks]
        keys, values = ((states @ turn.T).flatten(-2) for states in coded)
        return keys, values

    def block(self, width: int) -> int:
        """Numbers that share a scale: a head, or all heads of a token where these are tiny."""
        return self.head_dim if self.head_dim >= 32 else width

    def code_bits(self, width: int) -> float:
        return 2 * width * (self.bits + 2 * NUMBER_BITS / self.block(width))


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


# Squared error of Lloyd's levels on a unit Gaussian, at 0, 1, 2, ... bits.
GAUSSIAN_ERROR = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.00064, 0.00016, 0.00004)


def allocated_bits(energies: Tensor, total: int) -> Tensor:
    """Bits of each coefficient for the least sum of squared errors; errors fall convexly, so greedy steps are best."""
    error = torch.tensor(GAUSSIAN_ERROR)
    gains = energies.float()[:, None] * (error[:-1] - error[1:])
    bits = torch.zeros(gains.shape, dtype=torch.long).flatten()
    bits[gains.flatten().topk(min(total, gains.numel())).indices] = 1
    return bits.view(gains.shape).sum(1)


@dataclass
class PlainPCA(Codec):
    """KVTC (arXiv 2511.01815) without its entropy coder: principal axes, bits by least squared error.

    Its groups' scales are static tables here, which cost nothing per token. Bits are allocated over all layers, keys
    and values apart.
    """

    first: int = 4
    bits: float = 4.0  # per number, in the mean
    axes: list[list[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]]] = field(default_factory=list)

    def fit(self, samples: list[Pair]) -> None:
        self.axes = [[] for _ in samples]
        for both in zip(*samples, strict=True):  # keys of all layers, then values
            found = [torch.linalg.eigh(torch.cov(states.double().T)) for states in both]
            bits = allocated_bits(torch.cat([energy for energy, _ in found]), int(self.bits * sum_width(both)))
            parts = bits.split([states.shape[-1] for states in both])
            for layer, states, (_, axes), part in zip(self.axes, both, found, parts, strict=True):
                mean, axes = states.mean(0), axes.float()
                coefficients = (states - mean) @ axes
                chosen = [(part == count).nonzero()[:, 0] for count in part.unique().tolist() if count]
                tables = [(which, levels_of(coefficients[:, which], int(part[which[0]]))) for which in chosen]
                layer.append((mean, axes, tables))

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        read = []
        for states, (mean, axes, tables) in zip((keys, values), self.axes[layer], strict=True):
            coefficients, coded = (states - mean) @ axes, torch.zeros_like(states)
            for which, levels in tables:
                coded[..., which] = nearest_level(coefficients[..., which], levels)
            read.append(coded @ axes.T + mean)
        return read[0], read[1]

    def code_bits(self, width: int) -> float:
        return 2 * width * self.bits


def sum_width(layers: tuple[Tensor, ...]) -> int:
    """Numbers of a token in all layers."""
    return sum(states.shape[-1] for states in layers)


@dataclass
class CareLatents(Codec):
    """CARE (arXiv 2603.17946) before partial rope: latents of the keys and of the values, ranks water-filled.

    ``share``: of the numbers, kept. ``bits``: of a latent's number; fewer than 16 are those of static tables.
    """

    first: int = 4
    share: float = 0.5
    bits: int = NUMBER_BITS
    latents: list[list[tuple[Tensor, Tensor | None]]] = field(default_factory=list)

    def fit(self, samples: list[Pair]) -> None:
        both = [states.double() for pair in samples for states in pair]
        found = [torch.linalg.eigh(states.T @ states) for states in both]
        total = int(self.share * sum(states.shape[-1] for states in both))
        ranks = water_fill([energy.clamp_min(0).flip(0) for energy, _ in found], total)
        made = []
        for states, (_, vectors), rank in zip(both, found, ranks, strict=True):
            basis = vectors[:, -rank:]
            tables = levels_of((states @ basis).float(), self.bits) if self.bits < NUMBER_BITS else None
            made.append((basis.float(), tables))
        self.latents = [made[place : place + 2] for place in range(0, len(made), 2)]

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        read = []
        for states, (basis, tables) in zip((keys, values), self.latents[layer], strict=True):
            latent = states @ basis
            read.append((latent if tables is None else nearest_level(latent, tables)) @ basis.T)
        return read[0], read[1]

    def code_bits(self, width: int) -> float:
        return 2 * width * self.share * self.bits

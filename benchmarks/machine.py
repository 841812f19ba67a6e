"""What this machine can do: the rates that the floors are made of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

MEMORY_BYTES = 150 << 20  # more than any cache of a CPU: what is cycled through this comes from memory


def fastest(call: Callable[[], object], seconds: float = 0.4, at_least: int = 3) -> float:
    """The least time of one call, in seconds, after a warm-up."""
    call()
    best, started, rounds = float("inf"), time.perf_counter(), 0
    while rounds < at_least or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        call()
        best, rounds = min(best, time.perf_counter() - begun), rounds + 1
    return best


def fastest_of(calls: dict[str, Callable[[], object]], seconds: float = 0.8, at_least: int = 4) -> dict[str, float]:
    """The least time of each call, rounds interleaved, so that a busy moment hits all of them."""
    best = {name: float("inf") for name in calls}
    for call in calls.values():
        call()
    started, rounds = time.perf_counter(), 0
    while rounds < at_least or time.perf_counter() - started < seconds * len(calls):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begun)
        rounds += 1
    return best


def cycle(make: Callable[[], tuple[Tensor, ...]], number_bytes: int) -> Callable[[], tuple[Tensor, ...]]:
    """Hands out copies in turn, enough of them that each comes from memory, as the layers of a model do."""
    copies = [make() for _ in range(max(1, min(400, -(-MEMORY_BYTES // number_bytes))))]
    position = [0]

    def following() -> tuple[Tensor, ...]:
        position[0] += 1
        return copies[position[0] % len(copies)]

    return following


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(64 << 20, dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / fastest(lambda: target.copy_(source))


def product_rate(rows: int, rank: int, tokens: int, dtype: torch.dtype, *, streamed: bool) -> float:
    """Multiply-adds per second of the two thin products of absorbed attention, the best way torch has for each.

    [rows, rank] x [rank, tokens] and [rows, tokens] x [tokens, rank]. ``streamed``: the cache operand comes from
    memory, as in a decode step; otherwise it lies in the CPU's caches, which no decode step can have.
    """
    query, weights = torch.randn(rows, rank).to(dtype), torch.randn(rows, tokens).to(dtype)
    size = tokens * rank * dtype.itemsize
    make = lambda: (torch.randn(tokens, rank).to(dtype),)  # noqa: E731
    following = cycle(make, size if streamed else MEMORY_BYTES)
    kernel = query[:, :, None, None]

    def image(latent: Tensor) -> Tensor:
        return latent.view(1, tokens, 1, rank).permute(0, 3, 1, 2)

    first = {
        "q cT": lambda: query @ following()[0].T,
        "c qT": lambda: following()[0] @ query.T,
        "convolution": lambda: conv2d(image(following()[0]), kernel),
    }
    second = {
        "p c": lambda: weights @ following()[0],
        "cT pT": lambda: following()[0].T @ weights.T,
        "gradient": lambda: conv2d_weight(image(following()[0]), kernel.shape, weights[None, :, :, None]),
    }
    seconds = min(fastest_of(first, 0.3).values()) + min(fastest_of(second, 0.3).values())
    return 2 * rows * rank * tokens / seconds

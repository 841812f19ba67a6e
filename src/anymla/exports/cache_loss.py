"""What an engine's quantised cache loses of an export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from anymla.exports.gauge_choice import bundled_windows
from anymla.modeling.arguments import cache_argument

TOKENS = 1024  # of text that the gauge was not chosen on
FP8_ENGINE = "a reference of its arithmetic in torch"


@dataclass(frozen=True)
class CacheLoss:
    """The same weights with two caches, the one of ``cache`` and one in float, on ``tokens`` held-out tokens.

    ``kl``: of the next token, nats. ``top1``: the share of equal most likely tokens. ``engine``: what ran both.
    """

    cache: str
    engine: str
    kl: float
    top1: float
    tokens: int

    @property
    def summary(self) -> str:
        """The figures in words."""
        return (
            f"a {self.cache} cache has KL {self.kl:.2g} to a cache of floats in {self.engine}, and {self.top1:.1%} of "
            f"most likely tokens stay ({self.tokens} held-out tokens)"
        )


def held_out(converted: Path) -> Tensor:
    """Windows [N,T] of bundled text."""
    return bundled_windows(converted, "valid", TOKENS)


def loss_between(cache: str, engine: str, floats: Iterable[Tensor], quantised: Iterable[Tensor]) -> CacheLoss:
    """Compares logits [T,V] of the same windows."""
    kl = equal = count = 0.0
    for exact, found in zip(floats, quantised, strict=True):
        exact, found = exact.float().log_softmax(-1), found.float().log_softmax(-1)
        kl += (exact.exp() * (exact - found)).sum().item()
        equal += (exact.argmax(-1) == found.argmax(-1)).sum().item()
        count += len(exact)
    return CacheLoss(cache, engine, kl / count, equal / count, int(count))


class Fp8Cache(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache of e4m3 with a scale of 1, as vLLM and SGLang keep it for --kv-cache-dtype fp8 unasked, read as float."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As DynamicCache's, of latent and rope key [B,1,T,..]."""
        held: tuple[Tensor, Tensor] = super().update(_in_e4m3(keys), _in_e4m3(values), *args, **kwargs)
        return held


def _in_e4m3(numbers: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return numbers.clamp(-largest, largest).to(torch.float8_e4m3fn).to(numbers.dtype)


@torch.no_grad()
def fp8_loss(converted: Path, model: Any) -> CacheLoss:
    """What fp8 loses of an export ``model``, in a reference of its arithmetic; kernels may round queries as well."""

    def logits(window: Tensor, cache: Any) -> Tensor:
        found: Tensor = model(input_ids=window[None], use_cache=True, **{cache_argument(model): cache}).logits[0]
        return found

    windows = held_out(converted)
    exact = (logits(window, DynamicCache()) for window in windows)
    return loss_between("fp8", FP8_ENGINE, exact, (logits(window, Fp8Cache()) for window in windows))

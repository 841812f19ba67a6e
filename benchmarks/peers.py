"""The methods that are compared, each with the settings among which calibration text alone chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from anymla.modeling.attention_spec import AttentionSpec

PAPER: dict[str, Any] = {"expected_rotation": False}
MHA2MLA_ROPES = ("high", "low", "uniform", "two-norm")
FOLDS = (1, 2, 4, 8, 16)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to convert: ``settings`` of a layer's attention and its cached numbers gives what to choose among.

    ``changes`` are then tried on top of the best of them. ``rebuilds``: CARE before partial rope, which is no
    conversion to anymla's layout. ``window``: the share of the bytes that an exact window takes.
    """

    settings: Callable[[AttentionSpec, int], list[Settings]]
    changes: tuple[Settings, ...] = ()
    rebuilds: bool = False
    window: float = 0.0


def widths(spec: AttentionSpec, heads: int, numbers: int) -> list[int]:
    """The two largest numbers of rotated dims, in halves of a head, that leave a fifth of the numbers to the latent."""
    halves = [2 * spec.rope_pairs >> halvings for halvings in range(8)]
    return [dims for dims in halves if dims >= 2 and heads * dims <= 0.8 * numbers][:2]


def per_head(spec: AttentionSpec, numbers: int, ropes: tuple[str, ...], factorization: str) -> list[Settings]:
    """MHA2MLA's layout: every KV head keeps pairs of its own."""
    choices = product(ropes, widths(spec, spec.num_kv_heads, numbers))
    return [PAPER | {"rope": rope, "rope_dims": dims, "factorization": factorization} for rope, dims in choices]


def shared_head(spec: AttentionSpec, numbers: int, factorization: str) -> list[Settings]:
    """TransMLA's layout: one head, or a part of it, keeps rope; the fold is a multiple of the collapse."""
    return [
        PAPER
        | {"rope": "rorope" if fold == 1 else f"freqfold-{fold}", "rope_dims": dims, "factorization": factorization}
        for dims, fold in product(widths(spec, 1, numbers), FOLDS)
        if fold * dims % (2 * spec.rope_pairs) == 0 and spec.rope_pairs % fold == 0
    ]


# Whitening by the inputs' covariance and principal components of the outputs are one and the same, so that CARE in
# TransMLA's layout differs from TransMLA in its ranks and, without the balance of keys and values, in their weight.
CARE: tuple[Settings, ...] = (
    {"filled": True},
    {"factorization": "whitened"},
    {"factorization": "whitened", "filled": True},
)
METHODS: dict[str, Method] = {
    "anymla": Method(lambda spec, numbers: [{}]),
    "anymla, exact window": Method(lambda spec, numbers: [{}], window=0.5),
    "CARE without partial RoPE": Method(lambda spec, numbers: [{}], rebuilds=True),
    "CARE via TransMLA": Method(lambda *layer: shared_head(*layer, "balanced-pca"), CARE),
    "TransMLA": Method(lambda *layer: shared_head(*layer, "balanced-pca")),
    "SVD-LLM whitening, MHA2MLA's rope": Method(lambda *layer: per_head(*layer, MHA2MLA_ROPES, "whitened")),
    "EliteKV": Method(lambda *layer: per_head(*layer, ("elite",), "joint-svd")),
    "MHA2MLA": Method(lambda *layer: per_head(*layer, MHA2MLA_ROPES, "joint-svd"), ({"factorization": "split-svd"},)),
}

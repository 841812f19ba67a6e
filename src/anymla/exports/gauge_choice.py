"""Chooses the gauge with which a cache of 8 or 4 bits loses least.

Engines quantise with one scale per block of numbers (q8_0, q4_0) or in floating point (fp8). The error of token t is
then proportional to the size of its row T c_t. Once an orthogonal map has spread it, all numbers get an equal part.
To second order this costs |T c_t|^2 |T^-T g_t|^2, with g the gradient of the loss by the latent. The best T makes the
second moments of T c and T^-T g equal, each token's weighted by the size of the other. Control theory calls this a
balanced realisation (Moore 1981). It is found by iteration.

Shapes: N tokens, r latent, r' as cached, K channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from anymla.data.text import bundled_text, calibration_windows
from anymla.exports.gauge import Gauge
from anymla.io.checkpoint import load_model, load_tokenizer, safe_config
from anymla.modeling.latent_attention import LatentAttention

TOKENS, LENGTH = 4096, 256  # of calibration text
ITERATIONS = 4
SHRINKAGE = 1e-3  # of a second moment's mean, added to it: directions that the text does not show
# The largest cached number: a seventh of what e4m3 holds, so that a scale of 1, which engines take unasked, has room
# for text that was not seen, and four thousand times the least that it holds in full precision.
LARGEST = 64.0


def chosen_gauges(converted: Path, *, block: int = 1) -> list[Gauge]:
    """The gauges of all converted layers, on bundled text.

    Args:
        converted: what ``anymla convert`` wrote.
        block: of how many numbers with one scale the cache consists, 1 for floating point. The latent is made a
            multiple of them wide.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    model, windows = load_model(converted, dtype="float32"), bundled_windows(converted, "train", TOKENS)
    return [_gauge(*rows, rank, block) for rank, rows in _observed(model, windows)]


def bundled_windows(converted: Path, split: str, tokens: int) -> Tensor:
    """Windows [N,T] of bundled text, 'train' or 'valid', that fit the model's context."""
    length = min(LENGTH, getattr(safe_config(converted).get_text_config(), "max_position_embeddings", LENGTH))
    return calibration_windows(bundled_text(split), load_tokenizer(converted), tokens=tokens, length=length, seed=0)


def _observed(model: Any, windows: Tensor) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """Rank, cached rows before rope and the loss's gradients by them [N,r+2K], per layer.

    The loss is of tokens drawn from the model itself, so that the gradients' second moment is the Fisher information.
    """
    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    for layer, (rows, gradients) in zip(layers, seen, strict=True):
        _watch(layer, rows, gradients)
    generator = torch.Generator().manual_seed(0)
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
    return [
        (layer.kv_lora_rank, (torch.cat(rows).double(), torch.cat(gradients).double()))
        for layer, (rows, gradients) in zip(layers, seen, strict=True)
    ]


def _watch(layer: LatentAttention, rows: list[Tensor], gradients: list[Tensor]) -> None:
    """Keeps what the layer caches, and the gradients by it."""

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        rows.append(output.detach()[0].clone())
        output.register_hook(lambda gradient: gradients.append(gradient[0]))

    def add(module: Any, inputs: Any, output: Tensor) -> None:
        rows[-1] += pad(output.detach()[0], (0, layer.qk_rope_head_dim))

    if layer.spec.linear_keys:
        layer.kv_a_proj_with_mqa.register_forward_hook(keep)
    else:
        layer.k_a_proj_with_mqa.register_forward_hook(keep)
        layer.v_a_proj.register_forward_hook(add)


def _gauge(rows: Tensor, gradients: Tensor, rank: int, block: int) -> Gauge:
    latent, rope = rows[:, :rank], rows[:, rank:].unflatten(1, (2, -1)).square().sum(1)
    encoder, decoder = latent_gauge(latent, gradients[:, :rank], rank + -rank % block)
    largest = LARGEST / (latent @ encoder.T).abs().max()
    if not rope.numel():
        return Gauge(encoder * largest, decoder / largest, rope[0])
    factors = torch.ones(rope.shape[1], dtype=torch.float64)  # for floating point, which asks for no more than a range
    if block > 1:
        factors = channel_factors(rope, gradients[:, rank:].unflatten(1, (2, -1)).square().sum(1))
    highest = LARGEST / (rope.sqrt() * factors).amax()
    return Gauge(encoder * largest, decoder / largest, factors * highest)


def latent_gauge(latent: Tensor, gradients: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Encoder [r',r] and decoder [r,r'] for latents and gradients [N,r]; ``width`` is r'."""
    size = weight = torch.ones(len(latent), 1, dtype=torch.float64)
    for _ in range(ITERATIONS):
        encoder, decoder = _balanced(latent.T @ (latent * weight), gradients.T @ (gradients * size))
        size, weight = _relative_size(latent @ encoder.T), _relative_size(gradients @ decoder)
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = torch.linalg.qr(noise).Q[:, : latent.shape[1]]
    return spread @ encoder, decoder @ spread.T


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """T and its inverse with T first T^T = T^-T second T^-1, diagonal; both second moments [r,r]."""
    root = torch.linalg.cholesky(_shrunk(first))
    values, axes = torch.linalg.eigh(root.T @ _shrunk(second) @ root)
    quarter = values.clamp_min(values[-1] * 1e-12) ** 0.25
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=torch.float64), upper=False)
    return quarter[:, None] * (axes.T @ inverse), root @ axes / quarter


def _shrunk(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean().clamp_min(1e-30)
    return moment + SHRINKAGE * mean * torch.eye(len(moment), dtype=torch.float64)


def _relative_size(rows: Tensor) -> Tensor:
    """[N,1]: the square of each row over their mean."""
    squares = rows.square().sum(1, keepdim=True)
    return squares / squares.mean().clamp_min(1e-30)


def channel_factors(energy: Tensor, gradient: Tensor) -> Tensor:
    """[K] factors for channels whose squares, and those of the gradients, are [N,K].

    Nothing spreads them, so the largest of a block sets its scale: half way between balanced and equal size.
    """
    size, cost = (squares.mean(0).clamp_min(1e-30) for squares in (energy, gradient))
    return (cost / size) ** 0.125 * size**-0.25

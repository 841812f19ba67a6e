"""CARE (ICLR 2026, arXiv 2603.17946): truncation in the metric of the inputs, rank water-filled over layers.

With C = E[x x^T] of an attention's inputs, a weight W is replaced by the truncated SVD of W C^{1/2} times C^{-1/2},
which is U U^T W with U the leading eigenvectors of W C W^T (anymla's ``whitened``). What is here and not in anymla: the
rank's allocation to layers, and the method before partial rope, which keeps the rotation of every key by rebuilding all
keys from the latent at each step. That cannot be absorbed, so it is a reference for quality and not a way to decode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymla.methods.mla.layer_plan import LayerPlan
from anymla.methods.mla.plan import MLAPlan
from anymla.model_run.stream import decoder_layers


def water_fill(spectra: list[Tensor], total: int) -> list[int]:
    """Ranks that add up to ``total``, at least 1 each: the next one always where it removes most.

    What a rank removes of a matrix is its eigenvalue's share of the matrix's sum (the normalised residual).
    """
    shares = [(spectrum / spectrum.sum().clamp_min(1e-300)).tolist() for spectrum in spectra]
    ranks = [1] * len(spectra)
    for _ in range(total - len(spectra)):
        gains = [share[rank] if rank < len(share) else -1.0 for share, rank in zip(shares, ranks, strict=True)]
        ranks[max(range(len(gains)), key=gains.__getitem__)] += 1
    return ranks


@torch.no_grad()
def input_grams(model: Any, windows: Tensor) -> list[Tensor]:
    """C = E[x x^T] [D,D] of every layer's attention, float64."""
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    grams = [torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64) for _ in attentions]

    def count(gram: Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1).double()
            gram.add_(x.T @ x)

        return hook

    hooks = [
        attention.register_forward_pre_hook(count(gram), with_kwargs=True)
        for attention, gram in zip(attentions, grams, strict=True)
    ]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [gram / windows.numel() for gram in grams]


def spectrum(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors as columns, of W C W^T."""
    weight = weight.double()
    values, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
    return values.clamp_min(0).flip(0), vectors.flip(1)


def filled_plan(plan: MLAPlan, model: Any, grams: list[Tensor]) -> MLAPlan:
    """``plan``, of one rank for all layers, with the same numbers in all, by the spectra of [W_k ; W_v]."""
    whole = []
    for layer, gram in zip(decoder_layers(model), grams, strict=True):
        weight = torch.cat([layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight])
        whole.append(spectrum(weight, gram)[0])
    ropes = [layer.rope_dims for layer in plan.layers if layer is not None]
    total = sum(layer.kv_rank or 0 for layer in plan.layers if layer is not None)
    layers = tuple(
        LayerPlan(cached_numbers=rank + (dims or 0), rope_dims=dims, kv_rank=rank)
        for rank, dims in zip(water_fill(whole, total), ropes, strict=True)
    )
    return plan.model_copy(update={"layers": layers})


@torch.no_grad()
def without_partial_rope(model: Any, grams: list[Tensor], numbers: int, *, filled: bool) -> None:
    """Truncates every k_proj and v_proj of ``model`` in place, ``numbers`` in all: what caching their latents gives.

    Keys and values have latents of their own, as in the paper, of one rank or, ``filled``, of water-filled ones.
    """
    projections = [
        (projection, gram)
        for layer, gram in zip(decoder_layers(model), grams, strict=True)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    found = [spectrum(projection.weight, gram) for projection, gram in projections]
    equal = [numbers * (place + 1) // len(found) - numbers * place // len(found) for place in range(len(found))]
    ranks = water_fill([values for values, _ in found], numbers) if filled else equal
    for (projection, _), (_, vectors), rank in zip(projections, found, ranks, strict=True):
        basis = vectors[:, :rank]
        projection.weight.copy_(basis @ (basis.T @ projection.weight.double()))

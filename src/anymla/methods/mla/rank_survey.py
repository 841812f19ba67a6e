"""What a spread of ranks over layers goes by: condition numbers of weights, energies of latents, Fisher information.

Shapes: D hidden, G key/value heads of d numbers, n = G d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.distributed import all_sum
from anymla.methods.base import Survey, Unheard
from anymla.methods.mla.factorization.output_aware import OutputAware
from anymla.methods.mla.layer_plan import typical_split
from anymla.methods.mla.observe import AttentionObserver
from anymla.methods.mla.rope import ROPE_CHOICES
from anymla.methods.mla.weights import build_attention, latent_problem
from anymla.methods.mla.whole import whole_layer
from anymla.model_run.stream import LayerBatch

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA
    from anymla.sweep.layer import Layer

ENERGY = 0.999  # share of a matrix' energy that its condition number looks at
LEAST = 1e-6  # of the largest singular value


class ConditionSurvey(Survey):
    """The fact "condition" of a layer: logarithms of the condition numbers of its key and its value weights."""

    def __init__(self, settings: MLA | None = None) -> None:
        self.settings = settings

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: the weights say it all."""
        return Unheard()

    def layer(self, layer: Layer, observed: Unheard) -> dict[str, Any]:
        """The facts of the layer."""
        return {"condition": [log_condition(weight) for weight in key_and_value(source_of(layer))]}


class EnergySurvey(Survey):
    """The fact "energies": what every number of a layer's latent keeps of the hidden states after its attention.

    Squared, over their squared size, by falling energy: eigenvalues of M^(1/2) Cov(y) M^(1/2) (output_aware.py), where
    channels take the rope dims that a uniform budget usually has.
    """

    def __init__(self, settings: MLA) -> None:
        self.settings = settings

    def observer(self, layer: Layer) -> AttentionObserver:
        """The same as for the conversion."""
        return AttentionObserver(self.settings, layer)

    def layer(self, layer: Layer, observed: AttentionObserver) -> dict[str, Any]:
        """The facts of the layer."""
        measured = observed.measured()
        rope_dims, _ = typical_split(layer.choice)
        problem = latent_problem(
            measured.source.weights,
            measured.moments,
            ROPE_CHOICES[self.settings.rope],
            rope_dims=rope_dims,
            expected_rotation=self.settings.expected_rotation,
        )
        energies = OutputAware().energies(problem)
        measured.close()
        return {"energies": (energies / measured.power).tolist()}


class FisherSurvey(Survey):
    """The fact "fisher": the mean of sqrt(E[gradient^2]) over a layer's key weights, plus that over its value weights.

    As Palu sums it up (arXiv 2407.21118; its rank_search.py).
    """

    backward = True

    def __init__(self, settings: MLA) -> None:
        self.settings = settings

    def observer(self, layer: Layer) -> WeightGradients:
        """Squared gradients."""
        return WeightGradients(layer)

    def layer(self, layer: Layer, observed: WeightGradients) -> dict[str, Any]:
        """The facts of the layer, over all processes."""
        return {"fisher": observed.information()}


class WeightGradients:
    """Sums of squared gradients of key and value weights, while the layer runs with our attention at full budget.

    That is exact, and its weights are where every family's are alike.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer, self.path, self.original = layer, layer.attention_path, layer.attention
        source = source_of(layer)
        whole = whole_layer(source.weights)
        attention = build_attention(self.original, source, whole, layer.config, layer.original.dtype)
        attention.always_expands = True
        layer.module.set_submodule(self.path, attention)
        names = ("kv_a_proj_with_mqa",) if source.spec.linear_keys else ("k_proj", "v_proj", "v_a_proj")
        weights = (getattr(attention, name, None) for name in names)
        self.weights: list[Tensor] = [part.weight for part in weights if part is not None][:2]
        self.sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in self.weights]
        self.windows = torch.zeros((), dtype=torch.float64, device=self.sums[0].device)

    def add(self, batch: LayerBatch) -> None:
        """Takes one window."""
        self.windows += 1
        for found, weight in zip(self.sums, self.weights, strict=True):
            if weight.grad is not None:
                found += weight.grad.double().square()

    def information(self) -> float:
        """The sum over both weights, over all processes; the layer has its own attention again."""
        self.layer.module.set_submodule(self.path, self.original)
        windows = all_sum(self.windows)
        return sum((all_sum(found) / windows).sqrt().mean().item() for found in self.sums)


RANK_SURVEYS: dict[str, Any] = {"lorc": ConditionSurvey, "energy": EnergySurvey, "fisher": FisherSurvey}


def source_of(layer: Layer) -> SourceAttention:
    """The layer's own attention, as anymla sees it."""
    if (spec := layer.old.attention) is None:
        raise ValueError(f"layer {layer.index} has no softmax attention")
    return read_attention(layer.attention, spec, layer.family, layer.config)


def key_and_value(source: SourceAttention) -> tuple[Tensor, Tensor]:
    """Key and value weights [n,D]; the gain of a norm of keys scales the rows of its weights."""
    weights = source.weights
    return (weights.key * weights.key_gain[:, :, None]).flatten(0, 1), weights.value.flatten(0, 1)


def log_condition(weight: Tensor) -> float:
    """log(s_1 / s_k) of a matrix' singular values, k being the last within ``ENERGY`` of all energy."""
    values: Tensor = torch.linalg.svdvals(weight)
    energy = values.square().cumsum(0)
    last = max(1, int((energy <= ENERGY * energy[-1]).sum()))
    smallest = max(values[last - 1].item(), LEAST * values[0].item(), 1e-300)
    return float((values[0] / smallest).clamp_min(1).log())

"""What is measured on one layer while the original runs through it: moments, targets, and what static norms lose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.distributed import all_sum_number
from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.layouts import LIMITS
from anymla.methods.mla.moments import Moments, MomentSums
from anymla.methods.mla.source import with_exact_window, with_static_norms, without_biases
from anymla.methods.mla.weights import build_attention
from anymla.methods.mla.whole import whole_layer
from anymla.methods.mla.window import exact_window_of
from anymla.model_run.activations import Activations
from anymla.model_run.stream import AttentionRun, LayerBatch, attention_inputs, first
from anymla.modeling.absorbed import additive_mask
from anymla.modeling.arguments import without_cache
from anymla.modeling.heads import causal_mask, rope_tables, score_bias
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.shared_attention import MAPS

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA
    from anymla.sweep.layer import Layer

OFF, OFF_16_BIT = 1e-2, 0.1  # relative error of the attention at full budget from which on a layer is not understood


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one layer's attention is fitted to.

    Args:
        source: the attention that is converted, without what the target cannot hold.
        moments: of its queries, keys and values on the windows to fit on.
        inputs: what it reads once the layers below are converted [N,T,D].
        target: what it should add to the residual stream then [N,T,D]: what the original adds to its own, plus what the
            converted layers below have lost of that stream by now.
        arguments: what else it is called with.
        power: squared size of the hidden states after the original attention, on the windows to choose on.
        norms_lost: squared loss there by static norms alone, at full budget; None where there are none.
    """

    source: SourceAttention
    moments: Moments
    inputs: Activations
    target: Activations
    arguments: dict[str, Any]
    power: float
    norms_lost: float | None

    def close(self) -> None:
        """Gives the memory and files of the activations back."""
        for room in (self.inputs, self.target):
            room.close()


class TargetObserver:
    """Writes what a layer's attention should add once the layers below are converted, while the original layer runs."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.attention = layer, layer.attention
        # for a difference of near-equal 16-bit numbers
        self.precision = torch.promote_types(layer.original.dtype, torch.float32)
        self.target = layer.original.like(self.precision)
        self.arguments: dict[str, Any] = {}
        self.power = torch.zeros((), dtype=torch.float64, device=layer.original.device)
        self.finite = torch.ones((), dtype=torch.bool, device=layer.original.device)

    def run_of(self, batch: LayerBatch) -> AttentionRun:
        """What went through the attention of a batch; its target is written."""
        if (run := batch.attention) is None:
            raise ValueError(f"layer {self.layer.index}: its attention did not run")
        self.arguments = {name: value for name, value in run.arguments.items() if name != MAPS}  # of other windows
        residual = self.layer.family.plain_residual
        stream = run.output.to(self.precision) + (batch.hidden if residual else 0)
        self.power += _power(stream[self.chosen(batch)])
        target = stream - (self.layer.converted[batch.windows] if residual else 0)
        self.target[batch.windows] = target
        self.finite = self.finite & target.isfinite().all()
        return replace(run, arguments=self.arguments)

    def fitted(self, batch: LayerBatch, run: AttentionRun) -> Tensor:
        """The inputs of the windows to fit on in a batch."""
        return run.inputs[: max(0, self.layer.windows.fit.stop - batch.windows.start)]

    def chosen(self, batch: LayerBatch) -> slice:
        """The windows to choose on in a batch."""
        choice = self.layer.windows.choice
        return slice(*(max(0, bound - batch.windows.start) for bound in (choice.start, choice.stop)))

    def check_finite(self, sums: Tensor) -> None:
        """Refuses to go on from targets or ``sums`` that overflowed.

        Raises:
            CheckpointError: they did.
        """
        if not (bool(self.finite) and bool(sums.isfinite().all())):
            dtype = str(self.layer.original.dtype).removeprefix("torch.")
            wider = "float32 or bfloat16" if dtype == "float16" else "float64, or look for weights that are too large"
            raise CheckpointError(f"activations overflow in {dtype} at layer {self.layer.index}: give --dtype {wider}")

    def converted_inputs(self) -> Activations:
        """What the attention reads after the converted layers below."""
        layer, start = self.layer, 0
        inputs = layer.converted.like(layer.converted.dtype)
        for part in attention_inputs(layer.module, self.attention, layer.converted, layer.arguments, layer.batch):
            inputs[start : start + len(part)] = part
            start += len(part)
        return inputs


class AttentionObserver(TargetObserver):
    """Sums moments and writes targets while the original layer runs; :meth:`measured` then gives both."""

    def __init__(self, settings: MLA, layer: Layer) -> None:
        if (spec := layer.old.attention) is None:
            raise ValueError(f"layer {layer.index} has no softmax attention")
        super().__init__(layer)
        self.whole = read_attention(layer.attention, spec, layer.family, layer.config)
        self.source = self.whole if LIMITS[settings.target].biases else without_biases(self.whole)
        self.window = exact_window_of(spec, settings)
        if self.window:
            self.source = self.whole = with_exact_window(self.whole, self.window)
        self.static_norms = settings.static_qk_norm and spec.qk_norm
        if self.static_norms:
            self.source = self._with_static_norms()
        self.sums = MomentSums(self.source.weights, self.window)
        self.mask: Tensor | None = None
        self.norms_lost = self.sums.mean.new_zeros(())

    def add(self, batch: LayerBatch) -> None:
        """Takes one batch of the original's stream."""
        run = self.run_of(batch)
        if batch.windows.start == 0:
            self._check(run)
        if len(fitted := self.fitted(batch, run)):
            self._add_moments(fitted, run.arguments)
        if self.static_norms:
            self._add_norms_lost(run, self.chosen(batch))

    def measured(self) -> Measured:
        """All that was measured, over all processes, once every batch was added.

        Raises:
            CheckpointError: activations overflow.
        """
        device = self.sums.gram.device
        power = all_sum_number(float(self.power), device)
        moments = self.sums.moments()
        self.check_finite(moments.weighted_gram)
        return Measured(
            source=self.source,
            moments=moments,
            inputs=self.converted_inputs(),
            target=self.target,
            arguments=self.arguments,
            power=max(power, 1e-300),
            norms_lost=all_sum_number(float(self.norms_lost), device) if self.static_norms else None,
        )

    def _with_static_norms(self) -> SourceAttention:
        """Fixed scales in the place of norms on queries and keys, as the windows to fit on have them."""
        layer = self.layer
        parts = attention_inputs(layer.module, self.attention, layer.original, layer.arguments, layer.batch)
        fitted = (part for number, part in enumerate(parts) if number * layer.batch < layer.windows.fit.stop)
        return with_static_norms(self.source, fitted)

    def _check(self, run: AttentionRun) -> None:
        """Refuses to convert what is not understood: at full budget a window's attention must be the original's."""
        whole, arguments = self._at_full_budget(self.whole), without_cache(run.arguments)
        found, expected = first(whole(run.inputs[:1], **arguments)).double(), run.output[:1].double()
        off = ((found - expected).square().mean() / expected.square().mean().clamp_min(1e-300)).sqrt().item()
        if off > (OFF_16_BIT if self.layer.saved.itemsize == 2 else OFF):
            raise UnsupportedModelError(
                f"layer {self.layer.index}: at full budget its attention is off by {off:.0%}; config.json must say "
                "what this family's config leaves to defaults: load the model with transformers and save it again"
            )

    def _add_norms_lost(self, run: AttentionRun, chosen: slice) -> None:
        """Adds the squared loss of a batch's output that static norms make at full budget."""
        if len(inputs := run.inputs[chosen]):
            output = first(self._at_full_budget(self.source)(inputs, **without_cache(run.arguments)))
            self.norms_lost += _power(output.double() - run.output[chosen].double())

    def _at_full_budget(self, source: SourceAttention) -> LatentAttention:
        layer = self.layer
        return build_attention(self.attention, source, whole_layer(source.weights), layer.config, layer.saved)

    def _add_moments(self, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Adds one batch's moments; what the family puts on scores comes as one additive mask."""
        rest, spec = dict(arguments), self.source.spec
        mask, positions, rope = (
            rest.pop(name, None) for name in ("attention_mask", "position_ids", "position_embeddings")
        )
        pairs = spec.rope_pairs
        if isinstance(rope, tuple) and pairs and rope[0].shape[-1] not in (pairs, 2 * pairs):
            raise UnsupportedModelError(
                f"rope turns {rope[0].shape[-1]} dims of a head, but config.json says {2 * pairs}"
            )
        cos, sin = rope_tables(spec.rope_table, pairs, rope, positions, inputs, self.layer.config)
        if self.mask is None:  # the same for all batches
            self.mask = self._additive(score_bias(mask, spec, self.layer.config, inputs, inputs.shape[1], rest), inputs)
        self.sums.add(*self.source.project(inputs), cos, sin, self.mask)

    def _additive(self, mask: Tensor | None, inputs: Tensor) -> Tensor:
        """The ``mask``, or the one that is meant where none is given."""
        if mask is not None:
            return additive_mask(mask, inputs.dtype)
        length = inputs.shape[1]
        if not getattr(self.attention, "is_causal", True):  # PaliGemma's, which sees all of a prompt
            return inputs.new_zeros(1, 1, length, length)
        return additive_mask(causal_mask(length, length, None, inputs.device), self.precision)


def _power(values: Tensor) -> Tensor:
    return values.double().square().sum()

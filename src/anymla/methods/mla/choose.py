"""Chooses the channels and the split of one layer's budget, and fits the attention that comes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from anymla.distributed import all_sum_number, rank, world
from anymla.methods.mla.costs import TRIED_FROM
from anymla.methods.mla.factorization import FACTORIZATIONS
from anymla.methods.mla.layer_plan import TYPICAL_ROPE_SHARE, LayerPlan
from anymla.methods.mla.observe import Measured
from anymla.methods.mla.reconstruct import Reconstruction
from anymla.methods.mla.refit import OutputBatch, refit_output
from anymla.methods.mla.rope import ROPE_CHOICES, RopeChoice
from anymla.methods.mla.rope.channel_pca import ChannelPCA, SpreadPCA
from anymla.methods.mla.rope.grid import GridPCA
from anymla.methods.mla.split import RopeSplit
from anymla.methods.mla.weights import build_attention, convert_layer
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA
    from anymla.sweep.layer import Layer

JUDGED_TOKENS = 2048  # of the choice windows: enough to tell candidates, and checks of one, apart
TRIAL = 4  # a candidate takes this part of the gradient steps before it is judged: a smaller one misjudges


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What became of one layer.

    ``error``: squared loss of the hidden states after its attention, converted layers below included, over their
    squared size, on choice windows. ``norms_lost``: the part that fixed scales in place of norms on queries and keys
    would lose alone.
    """

    layer: int
    rope_dims: int
    kv_rank: int
    error: float
    norms_lost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An attention, whether it was refitted, and its squared loss: while it competes, on ``_judged`` windows alone.

    ``error`` is NaN where nobody asked.
    """

    attention: LatentAttention
    error: float
    refitted: bool

    @property
    def rope_dims(self) -> int:
        """Its rotated numbers per token."""
        return self.attention.qk_rope_head_dim


class LayerFit:
    """One layer's candidates: builds, fits and judges them on what was measured."""

    def __init__(self, settings: MLA, layer: Layer, measured: Measured) -> None:
        self.settings, self.layer, self.measured = settings, layer, measured
        self.plan: LayerPlan = layer.choice
        self.original = layer.attention
        self.factorization = FACTORIZATIONS[settings.factorization]
        self.steps = (settings.reconstruction_steps or 0) * self.factorization.refits_output

    def best(self) -> Candidate:
        """The channels and the split that lose least on the choice windows, refitted and reconstructed."""
        found = self._best(trial=self.steps // TRIAL if self.steps >= TRIED_FROM else 0)
        if self.factorization.refits_output and not found.refitted:
            found = self._refitted(found)
        if self.steps:
            self._reconstruct(found.attention, self.steps)
        elif found.refitted:
            return found
        return replace(found, error=self._error(found.attention, self.layer.windows.choice))

    def result(self, best: Candidate) -> LayerResult:
        """What is to be said of the layer with the attention of ``best``."""
        measured, attention = self.measured, best.attention
        return LayerResult(
            layer=self.layer.index,
            rope_dims=attention.qk_rope_head_dim,
            kv_rank=attention.kv_lora_rank,
            error=best.error / measured.power,
            norms_lost=None if measured.norms_lost is None else measured.norms_lost / measured.power,
        )

    def spec(self, attention: LatentAttention) -> LayerSpec:
        """The layer with ``attention``."""
        return replace(attention.layer_spec, module=f"{self.layer.name}.{self.layer.attention_path}")

    def share_lost(self, split: RopeSplit) -> float:
        """The error of :class:`LayerResult` that this split would have, before anything is fitted to it."""
        attention = self._build(split.rope_dims, self._rule(split.rope_step))
        return self._error(attention, self.layer.windows.choice) / self.measured.power

    def _near(self) -> float:
        """Rope dims near which the choice lies: the share of the last converted layer."""
        below = next((result for result in self.layer.below[::-1] if result is not None and result["rope_dims"]), None)
        share = TYPICAL_ROPE_SHARE if below is None else below["rope_dims"] / (below["rope_dims"] + below["kv_rank"])
        return share * self.plan.cached_numbers

    def _best(self, trial: int) -> Candidate:
        """The best candidate; each is judged where it takes ``trial`` gradient steps."""
        rules: list[RopeChoice] = [self._rule(self.plan.rope_step)]
        if trial and isinstance(rules[0], ChannelPCA):
            rules.append(SpreadPCA())
        choices = self.plan.rope_choices if self.plan.rope_dims is None else (self.plan.rope_dims,)
        if len(rules) == len(choices) == 1:
            return Candidate(attention=self._build(choices[0], rules[0]), error=math.nan, refitted=False)
        found = []
        for rule in rules:
            candidate = self._descend(rule, choices, self._near(), 0)
            if trial:
                candidate = self._descend(rule, choices, candidate.rope_dims, trial)
            found.append(candidate)
        return min(found, key=lambda candidate: candidate.error)

    def _descend(self, rule: RopeChoice, choices: tuple[int, ...], near: float, trial: int) -> Candidate:
        """The best split, found by walking downhill from the choice that is nearest to ``near``."""
        index = min(range(len(choices)), key=lambda i: abs(choices[i] - near))
        best = self._candidate(choices[index], rule, trial)
        for ahead in (choices[:index][::-1], choices[index + 1 :]):
            for rope_dims in ahead:
                candidate = self._candidate(rope_dims, rule, trial)
                if candidate.error >= best.error:
                    break
                best = candidate
            if best.rope_dims != choices[index]:
                break  # it went down on this side: the other one goes up
        return best

    def _candidate(self, rope_dims: int, rule: RopeChoice, trial: int) -> Candidate:
        candidate = Candidate(attention=self._build(rope_dims, rule), error=math.nan, refitted=False)
        if trial:
            candidate = self._refitted(candidate)
            self._reconstruct(candidate.attention, trial)
        return replace(candidate, error=self._error(candidate.attention, self._judged()))

    def _judged(self) -> slice:
        """Those of the choice windows that candidates and steps are judged on: ``JUDGED_TOKENS``, of all processes."""
        choice, length = self.layer.windows.choice, self.measured.inputs.shape[1]
        mine = len(range(rank(), max(1, JUDGED_TOKENS // length), world()))
        return slice(choice.start, min(choice.start + mine, choice.stop))

    def _build(self, rope_dims: int, rope: RopeChoice) -> LatentAttention:
        kv_rank = self.plan.cached_numbers - rope_dims if self.plan.kv_rank is None else self.plan.kv_rank
        source = replace(self.measured.source, shared=self.layer.old.shared)  # it may hand its map on
        converted = convert_layer(
            source.weights,
            self.measured.moments,
            rope,
            self.factorization,
            rope_dims=rope_dims,
            kv_rank=kv_rank,
            expected_rotation=self.settings.expected_rotation,
        )
        return build_attention(self.original, source, converted, self.layer.config, self.layer.saved)

    def _rule(self, rope_step: int | None) -> RopeChoice:
        return ROPE_CHOICES[self.settings.rope] if rope_step is None else GridPCA(rope_step)

    def _refitted(self, candidate: Candidate) -> Candidate:
        windows, attention = self.layer.windows, candidate.attention
        parts = windows.fit, windows.choice
        error = refit_output(attention, lambda part: self._lost(attention, part), *parts, self.layer.saved)
        return replace(candidate, error=error, refitted=True)

    def _reconstruct(self, attention: LatentAttention, steps: int) -> None:
        measured, windows = self.measured, self.layer.windows
        reconstruction = Reconstruction(
            attention, measured.inputs, measured.target, measured.arguments, self.layer.batch, self.layer.saved
        )
        reconstruction.run(steps, windows.fit, self._judged(), self.settings.seed)

    def _error(self, attention: LatentAttention, windows: slice) -> float:
        """Squared loss of the layer's output on ``windows`` of all processes."""
        batches = self._lost(attention, windows)
        lost = float(sum(batch.lacking.double().square().sum() for batch in batches))
        return all_sum_number(lost, attention.o_proj.weight.device)

    def _lost(self, attention: LatentAttention, windows: slice) -> Iterator[OutputBatch]:
        """What the output projection reads and what its output lacks, in batches."""
        seen: list[Tensor] = []
        measured, batch = self.measured, self.layer.batch
        hook = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            for inputs, target in zip(
                measured.inputs.split(batch, windows), measured.target.split(batch, windows), strict=True
            ):
                output, _ = attention(inputs, **measured.arguments)
                yield OutputBatch(seen.pop(), target - output)
        finally:
            hook.remove()

"""One layer's conversion: what is measured on it, the split of its budget, the refit of its output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.attention import SourceAttention, read_attention
from anymla.architectures.families import Family
from anymla.architectures.parts import attention_path
from anymla.distributed import all_sum_number
from anymla.errors import CheckpointError, UnsupportedModelError
from anymla.layouts import LIMITS
from anymla.methods.mla.costs import TRIED_FROM
from anymla.methods.mla.factorization import FACTORIZATIONS
from anymla.methods.mla.moments import Moments, MomentSums
from anymla.methods.mla.plan import LayerPlan
from anymla.methods.mla.reconstruct import Reconstruction
from anymla.methods.mla.refit import refit_output
from anymla.methods.mla.rope import ROPE_CHOICES, ChannelPCA, GridPCA, RopeChoice, SpreadPCA
from anymla.methods.mla.settings import MLA
from anymla.methods.mla.static_norm import with_static_norms
from anymla.methods.mla.weights import build_attention, convert_layer, whole_layer
from anymla.methods.mla.window import exact_window_of
from anymla.model_run.activations import Activations
from anymla.model_run.stream import AttentionStep, attention_inputs, batch_size, first, run_layer
from anymla.modeling.absorbed import additive_mask
from anymla.modeling.arguments import without_cache
from anymla.modeling.heads import rope_tables, score_bias
from anymla.modeling.latent_attention import LatentAttention
from anymla.modeling.spec import AttentionSpec

TRIAL = 4  # a candidate takes this part of the gradient steps before it is judged: a smaller one misjudges


@dataclass(frozen=True)
class Split:
    """Which calibration windows serve what: moments and refit, choices, and the report at the end."""

    fit: slice
    choice: slice
    held_out: slice

    @classmethod
    def of(cls, windows: int) -> Split:
        """Five eighths to fit, two to choose, one held out."""
        held_out, choice = max(1, windows // 8), max(1, windows // 4)
        first, second = windows - held_out - choice, windows - held_out
        return cls(slice(0, first), slice(first, second), slice(second, windows))


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What became of one layer.

    ``error``: squared loss of the hidden states behind its attention, converted layers below included, over their
    squared size, on choice windows. ``norms_lost``: the part that fixed scales in place of norms on queries and keys
    would lose alone.
    """

    layer: int
    rope_dims: int
    kv_rank: int
    error: float
    norms_lost: float | None = None


class LayerStep:
    """One layer's conversion: holds that layer's activations, and no other's.

    ``path`` is where in ``layer`` its attention is; ``config`` the language model's; ``saved`` the dtype of the new
    weights in the checkpoint, to which they are rounded when they are made.
    """

    def __init__(
        self,
        layer: Any,
        spec: AttentionSpec,
        family: Family,
        config: Any,
        plan: LayerPlan,
        recipe: MLA,
        arguments: dict[str, Any],
        split: Split,
        saved: torch.dtype,
    ) -> None:
        self.layer, self.spec, self.family, self.config = layer, spec, family, config
        self.plan, self.recipe, self.call, self.split, self.saved = plan, recipe, arguments, split, saved
        if (path := attention_path(layer)) is None:
            raise UnsupportedModelError(f"{type(layer).__name__} has no attention where its config means one")
        self.path = path
        self.attention = layer.get_submodule(self.path)
        self.read = read_attention(self.attention, spec, family, config)
        self.source = self.read if LIMITS[recipe.target].biases else self.read.without_biases()
        self.window = exact_window_of(spec, recipe)
        if self.window:
            self.source = self.read = self.read.with_exact_window(self.window)
        self.static_norms = recipe.static_qk_norm and spec.qk_norm

    def measure(self, index: int, original: Activations, converted: Activations) -> None:
        """Collects moments on the original's activations, inputs below the converted layers, and targets.

        The target is what the original attention adds to the residual stream, plus what the converted layers below
        have lost of that stream by now. ``original`` moves on to the hidden states behind this layer, in place.
        """
        self.batch = batch_size(self.spec.num_heads, original.shape[1]) if self.family.batched else 1
        if self.static_norms:
            self._take_static_norms(original)
        sums, seen = MomentSums(self.source.weights, self.window), 0
        precision = torch.promote_types(original.dtype, torch.float32)  # for a difference of near-equal 16-bit numbers
        self.target, self.inputs = original.like(precision), converted.like(converted.dtype)
        self.stream_power, self.norms_lost, finite = 0.0, 0.0, True
        for step in run_layer(self.layer, self.attention, original, self.call, self.batch):
            if not seen:
                self._check(step, index)
            part = slice(seen, seen + len(step.inputs))
            fitted = step.inputs[: max(0, self.split.fit.stop - seen)]
            if len(fitted):
                self._add(sums, fitted, step.arguments)
            stream = step.attended.to(precision) + (original[part] if self.family.plain_residual else 0)
            chosen = slice(*(max(0, bound - seen) for bound in (self.split.choice.start, self.split.choice.stop)))
            self.stream_power += stream[chosen].double().square().sum().item()
            if self.static_norms:
                self._add_norms_lost(step, chosen)
            self.target[part] = target = stream - (converted[part] if self.family.plain_residual else 0)
            finite = finite and bool(target.isfinite().all())
            original[part] = step.output
            seen = part.stop
        self.arguments = step.arguments
        self.stream_power = all_sum_number(self.stream_power, sums.gram.device)
        self.moments: Moments = sums.moments()
        self._check_finite(finite and bool(self.moments.weighted_gram.isfinite().all()), original.dtype, index)
        self._take_inputs(converted)

    def _check_finite(self, finite: bool, of: torch.dtype, index: int) -> None:
        if not finite:
            dtype = str(of).removeprefix("torch.")
            wider = "float32 or bfloat16" if dtype == "float16" else "float64, or look for weights that are too large"
            raise CheckpointError(f"activations overflow in {dtype} at layer {index}: give --dtype {wider}")

    def _take_static_norms(self, original: Activations) -> None:
        """Puts fixed scales in the place of norms on queries and keys, as the windows to fit on have them."""
        parts = attention_inputs(self.layer, self.attention, original, self.call, self.batch)
        fitted = (part for number, part in enumerate(parts) if number * self.batch < self.split.fit.stop)
        self.source = with_static_norms(self.source, fitted)

    def _take_inputs(self, converted: Activations) -> None:
        """Keeps what the attention reads below the converted layers."""
        attended_inputs = attention_inputs(self.layer, self.attention, converted, self.call, self.batch)
        for start, inputs in zip(range(0, len(converted), self.batch), attended_inputs, strict=True):
            self.inputs[start : start + len(inputs)] = inputs

    def _check(self, step: AttentionStep, index: int) -> None:
        """Refuses to convert what is not understood: at full budget a window's attention must be the original's."""
        whole = self._whole(self.read)
        arguments = without_cache(step.arguments)
        found, expected = first(whole(step.inputs[:1], **arguments)).double(), step.attended[:1].double()
        off = ((found - expected).square().mean() / expected.square().mean().clamp_min(1e-300)).sqrt().item()
        if off > (0.1 if self.saved.itemsize == 2 else 1e-2):
            raise UnsupportedModelError(
                f"layer {index}: at full budget its attention is off by {off:.0%}; config.json must say what this "
                "family's config leaves to defaults: load the model with transformers and save it again"
            )

    def _add_norms_lost(self, step: AttentionStep, chosen: slice) -> None:
        """Adds the squared loss of a batch's output that static norms make at full budget."""
        if len(inputs := step.inputs[chosen]):
            arguments = without_cache(step.arguments)
            lost = first(self._whole(self.source)(inputs, **arguments)).double() - step.attended[chosen].double()
            self.norms_lost += lost.square().sum().item()

    def _whole(self, source: SourceAttention) -> LatentAttention:
        """The attention at full budget."""
        return build_attention(self.attention, source, whole_layer(source.weights), self.config, self.saved)

    def _add(self, sums: MomentSums, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Adds one batch's moments; what the family puts on scores comes as one additive mask."""
        rest = dict(arguments)
        mask, positions, rope = (
            rest.pop(name, None) for name in ("attention_mask", "position_ids", "position_embeddings")
        )
        pairs = self.spec.rope_pairs
        if isinstance(rope, tuple) and pairs and rope[0].shape[-1] not in (pairs, 2 * pairs):
            raise UnsupportedModelError(f"rope turns {rope[0].shape[-1]} dims of a head, config.json means {2 * pairs}")
        cos, sin = rope_tables(self.source.spec.rope_table, self.spec.rope_pairs, rope, positions, inputs, self.config)
        mask = score_bias(mask, self.source.spec, self.config, inputs, inputs.shape[1], rest)
        if mask is None and not getattr(self.attention, "is_causal", True):  # PaliGemma's, which sees all of a prompt
            mask = inputs.new_zeros(1, 1, inputs.shape[1], inputs.shape[1])
        sums.add(*self.source.project(inputs), cos, sin, None if mask is None else additive_mask(mask, inputs.dtype))

    def choose(self, index: int, near: float) -> tuple[LatentAttention, LayerResult]:
        """The channels and the split that lose least on the choice windows, refitted and reconstructed."""
        refits = FACTORIZATIONS[self.recipe.factorization].refits_output
        steps = (self.recipe.reconstruction_steps or 0) * refits
        best, refitted = self._best(near, steps // TRIAL if steps >= TRIED_FROM else 0)
        if refits and not refitted:
            self._refit(best)
        self._reconstruct(best, steps)
        error = self._error(best) / max(self.stream_power, 1e-300)
        sizes = {"rope_dims": best.qk_rope_head_dim, "kv_rank": best.kv_lora_rank}
        lost = all_sum_number(self.norms_lost, best.o_proj.weight.device) / max(self.stream_power, 1e-300)
        return best, LayerResult(layer=index, **sizes, error=error, norms_lost=lost if self.static_norms else None)

    def share_lost(self, rope_dims: int, rope_step: int | None) -> float:
        """The error of :class:`LayerResult` that this split would have, before anything is fitted to it."""
        return self._error(self._build(rope_dims, self._rule(rope_step))) / max(self.stream_power, 1e-300)

    def install(self, attention: LatentAttention) -> None:
        """Puts the converted attention into the layer."""
        self.layer.set_submodule(self.path, attention)

    def close(self) -> None:
        """Gives the memory and files of this layer's activations back."""
        for room in (self.inputs, self.target):
            room.close()

    def _error(self, attention: LatentAttention) -> float:
        """Squared loss of the layer's output on the choice windows."""
        lost = sum(lost.double().square().sum().item() for _, lost in self._lost(attention, self.split.choice))
        return all_sum_number(lost, attention.o_proj.weight.device)

    def _best(self, near: float, trial: int) -> tuple[LatentAttention, bool]:
        """The best candidate, and whether it was refitted: so it is judged where it takes ``trial`` gradient steps."""
        rules: list[RopeChoice] = [self._rule(self.plan.rope_step)]
        if trial and isinstance(rules[0], ChannelPCA):
            rules.append(SpreadPCA())
        choices = self.plan.rope_choices if self.plan.rope_dims is None else (self.plan.rope_dims,)
        if len(rules) == len(choices) == 1:
            return self._build(choices[0], rules[0]), False
        found = []
        for rule in rules:
            candidate = self._descend(rule, choices, near * self.plan.cached_numbers, 0)
            if trial:
                candidate = self._descend(rule, choices, candidate[0].qk_rope_head_dim, trial)
            found.append(candidate)
        return min(found, key=lambda candidate: candidate[1])[0], trial > 0

    def _descend(
        self, rule: RopeChoice, choices: tuple[int, ...], near: float, trial: int
    ) -> tuple[LatentAttention, float]:
        """The best split and its error, found by walking downhill from the choice that is nearest to ``near``."""
        index = min(range(len(choices)), key=lambda i: abs(choices[i] - near))
        best, least = self._candidate(choices[index], rule, trial)
        for ahead in (choices[:index][::-1], choices[index + 1 :]):
            for rope_dims in ahead:
                candidate, error = self._candidate(rope_dims, rule, trial)
                if error >= least:
                    break
                best, least = candidate, error
            if best.qk_rope_head_dim != choices[index]:
                break  # it went down on this side: the other one goes up
        return best, least

    def _candidate(self, rope_dims: int, rule: RopeChoice, trial: int) -> tuple[LatentAttention, float]:
        attention = self._build(rope_dims, rule)
        if trial:
            self._refit(attention)
            self._reconstruct(attention, trial)
        return attention, self._error(attention)

    def _refit(self, attention: LatentAttention) -> None:
        split = self.split
        refit_output(attention, lambda windows: self._lost(attention, windows), split.fit, split.choice, self.saved)

    def _reconstruct(self, attention: LatentAttention, steps: int) -> None:
        if steps:
            reconstruction = Reconstruction(attention, self.inputs, self.target, self.arguments, self.batch, self.saved)
            reconstruction.run(steps, self.split.fit, self.split.choice, self.recipe.seed)

    def _rule(self, rope_step: int | None) -> RopeChoice:
        return ROPE_CHOICES[self.recipe.rope] if rope_step is None else GridPCA(rope_step)

    def _build(self, rope_dims: int, rope: RopeChoice) -> LatentAttention:
        rank = self.plan.cached_numbers - rope_dims if self.plan.kv_rank is None else self.plan.kv_rank
        converted = convert_layer(
            self.source.weights,
            self.moments,
            rope,
            FACTORIZATIONS[self.recipe.factorization],
            rope_dims=rope_dims,
            kv_rank=rank,
            expected_rotation=self.recipe.expected_rotation,
        )
        return build_attention(self.attention, self.source, converted, self.config, self.saved)

    def _lost(self, attention: LatentAttention, windows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: the input of the output projection, and the target less its output."""
        seen: list[Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            for inputs, target in zip(
                self.inputs.split(self.batch, windows), self.target.split(self.batch, windows), strict=True
            ):
                output, _ = attention(inputs, **self.arguments)
                yield seen.pop(), target - output
        finally:
            hook.remove()

"""What serving engines' layouts can hold, and which models fit into them; from the config alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from anymla.architectures.families import FAMILIES
from anymla.engine_shapes import GPU, LLAMA_CPP, EngineShapes
from anymla.errors import InfeasibleError, RecipeError, UnsupportedModelError
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import ModelSpec, RopeSpec

GRID_ROPE = "channel-pca"  # the rope choice that knows how to keep to a grid


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a conversion: one split for all layers; rope frequencies in a geometric series; no biases."""

    uniform: bool = True
    grid: bool = True
    biases: bool = False


class Layout(ABC):
    """The models that one format of anymla.exports can hold.

    ``engines``: those that read it. ``limits``: what a conversion for it keeps to. ``shapes``: the sizes and number
    formats that the engines' kernels take.
    """

    name: ClassVar[str]
    engines: ClassVar[tuple[str, ...]]
    limits: ClassVar[Limits]
    shapes: ClassVar[EngineShapes] = GPU

    @abstractmethod
    def refusal(self, spec: AttentionSpec, model_spec: ModelSpec, *, static_norms: bool) -> str | None:
        """Returns why no conversion of this model fits, or None; all its layers have the attention ``spec``.

        ``static_norms``: whether fixed scales may stand in for norms on queries and keys.
        """

    @abstractmethod
    def verdict(self, model_spec: ModelSpec) -> tuple[str, str]:
        """Returns how exact the export of a model that fits is, and what that takes."""


class DeepseekLayout(Layout):
    """DeepSeek-V3's own attention and dense block."""

    name = "deepseek"
    engines: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang")
    limits = Limits()

    def refusal(self, spec: AttentionSpec, model_spec: ModelSpec, *, static_norms: bool) -> str | None:
        """Returns what of the model DeepSeek's block has no place for."""
        if model_spec.other_block is not None:
            return model_spec.other_block
        if spec.qkv_bias or spec.output_bias:
            return "its attention has biases, DeepSeek's has none"
        if not plain_pairs(model_spec.rope, spec.rope_pairs):
            kind = "no rope" if model_spec.rope is None else f"rope of type {model_spec.rope.rope_type}"
            return f"it has {kind}: no pair turns as in DeepSeek's plain rope"
        if spec.qk_norm and not static_norms:
            return (
                "it has norms on queries and keys, DeepSeek's attention has none (--static-qk-norm puts fixed scales "
                "in their place, at a loss)"
            )
        return None

    def verdict(self, model_spec: ModelSpec) -> tuple[str, str]:
        """Constrained: to one split on a grid."""
        most = (most_rope_dims(self.name, GRID_ROPE, model_spec) or 0) // 2
        needs = f"one split for all layers, at most {most} rope channels on a grid, no biases"
        return "constrained", f"convert --target {self.name}: {needs}"


class VllmLayout(Layout):
    """The family's own model, whose latent attention vLLM's transformers backend runs."""

    name = "vllm"
    engines = ("vLLM",)
    limits = Limits(grid=False, biases=True)

    def refusal(self, spec: AttentionSpec, model_spec: ModelSpec, *, static_norms: bool) -> str | None:
        """Returns what keeps the backend from running the family; its attention fits."""
        return backend_refusal(model_spec.text_model_type)

    def verdict(self, model_spec: ModelSpec) -> tuple[str, str]:
        """Exact: layers are padded to one size."""
        needs = f"layers are padded to the widest; with convert --target {self.name} they have one split"
        if model_spec.experts:
            needs += "; vLLM 0.32 runs mixtures of experts on GPUs only"
        return "exact", f"any plan: {needs}"


class GgufLayout(DeepseekLayout):
    """A file of llama.cpp, made of the deepseek export; llama.cpp's kernels take any width."""

    name = "gguf"
    engines = ("llama.cpp",)
    shapes = LLAMA_CPP

    def verdict(self, model_spec: ModelSpec) -> tuple[str, str]:
        """As for deepseek, with a tokenizer that llama.cpp has."""
        exactness, needs = super().verdict(model_spec)
        return exactness, f"{needs}; a tokenizer that llama.cpp has, which convert checks first"


FREE = Limits(uniform=False, grid=False, biases=True)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (DeepseekLayout(), VllmLayout(), GgufLayout())}
LIMITS: Mapping[str | None, Limits] = {None: FREE} | {name: layout.limits for name, layout in LAYOUTS.items()}
SHAPES: Mapping[str | None, EngineShapes] = {None: EngineShapes()} | {
    name: layout.shapes for name, layout in LAYOUTS.items()
}
TARGETS = tuple(LAYOUTS)
GRID_TARGETS = tuple(name for name, layout in LAYOUTS.items() if layout.limits.grid)

if TYPE_CHECKING:
    Target = str
else:
    Target = Literal[TARGETS]  # settings and options are checked against it


def listed(names: Iterable[str], last: str) -> str:
    """The names as "a, b and c", ``last`` being the word before the last one."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final


def plain_pairs(rope: RopeSpec | None, pairs: int) -> int:
    """How many of the P rope pairs of a head, from the fastest on, turn with theta^(-i/P) at any context length.

    llama3 scaling leaves pairs alone whose wavelength is below the original context over high_freq_factor.
    """
    if rope is None or rope.rope_type not in ("default", "llama3"):
        return 0
    if rope.rope_type == "default":
        return pairs
    longest = float(rope.settings["original_max_position_embeddings"]) / float(rope.settings["high_freq_factor"])
    return sum(2 * math.pi * rope.theta ** (index / pairs) < longest for index in range(pairs))


def target_refusal(target: Target, model_spec: ModelSpec, *, static_norms: bool = False) -> str | None:
    """Returns why no conversion of this model can be exported to ``target``, or None.

    ``static_norms``: whether fixed scales may stand in for norms on queries and keys.
    """
    specs = list(model_spec.attention_layers.values())
    windows = [spec.sliding_window for spec in specs if spec.sliding_window is not None]
    if model_spec.has_vision:
        return "it is a vision-language model"
    if len(specs) < len(model_spec.layers):
        return "some layers have no softmax attention"
    if windows and min(windows) < model_spec.max_position_embeddings:
        return f"it has a sliding window of {min(windows)} tokens"
    if model_spec.beyond is not None:
        return f"it has {model_spec.beyond}"
    if any(spec != specs[0] for spec in specs):
        return "its layers differ in heads, rope or window"
    return LAYOUTS[target].refusal(specs[0], model_spec, static_norms=static_norms)


def backend_refusal(model_type: str) -> str | None:
    """What keeps vLLM's transformers backend from running a family, whatever its config says; None for nothing."""
    if FAMILIES[model_type].all_layers_attend:
        return "its layers mix tokens beside attention too, and vLLM's transformers backend keeps no state of that"
    return FAMILIES[model_type].unserved


def check_target(target: Target, model: str, model_spec: ModelSpec, *, static_norms: bool) -> None:
    """Refuses a target that this model cannot have; ``static_norms`` as in :func:`target_refusal`.

    Raises:
        UnsupportedModelError: why, and which target is left.
    """
    if (reason := target_refusal(target, model_spec, static_norms=static_norms)) is not None:
        free = [other for other in TARGETS if target_refusal(other, model_spec) is None]
        left = f"--target {free[0]} can hold it" if free else "it serves in transformers, without --target"
        raise UnsupportedModelError(f"--target {target} cannot hold {model}: {reason}; {left}")


def check_cache_type(cache_type: str | None, target: Target | None) -> None:
    """Refuses a quantised cache that the target's engines do not have.

    Raises:
        RecipeError: names the targets that have it.
    """
    if cache_type is not None and cache_type not in SHAPES[target].cache_types:
        having = listed((name for name, layout in LAYOUTS.items() if cache_type in layout.shapes.cache_types), "or")
        own = listed(SHAPES[target].cache_types, "and") if target is not None else ""
        raise RecipeError(
            f"--cache-type {cache_type} needs --target {having}" + (f"; --target {target} has {own}" if own else "")
        )


def verdicts(model_spec: ModelSpec) -> dict[str, tuple[str, str]]:
    """For each target whether its export is 'exact' with any plan, 'constrained', 'lossy' or 'impossible', and why."""
    found = {"transformers": ("exact", "any plan")}
    for target in TARGETS:
        if (reason := target_refusal(target, model_spec)) is not None:
            possible = target_refusal(target, model_spec, static_norms=True) is None
            found[target] = ("lossy" if possible else "impossible", reason)
        else:
            found[target] = LAYOUTS[target].verdict(model_spec)
    return found


def most_rope_dims(target: Target, rope: str, model_spec: ModelSpec) -> int | None:
    """Rope dims that ``target`` holds: on a grid two per plain frequency, and what kernels take; None: no limit.

    Raises:
        InfeasibleError: the rope choice has channels that heads do not share.
    """
    most = SHAPES[target].rope
    if not LIMITS[target].grid:
        return most
    if rope != GRID_ROPE:
        raise InfeasibleError(
            f"--rope {rope} chooses channels that are no grid, which --target {target} needs: leave --rope out, or "
            "give --target vllm"
        )
    plain = 2 * most_channels(model_spec)
    return plain if most is None else min(plain, most)


def most_channels(model_spec: ModelSpec) -> int:
    """Channels of a grid: one per frequency that turns as in plain rope."""
    spec = next(iter(model_spec.attention_layers.values()))
    return plain_pairs(model_spec.rope, spec.rope_pairs)


def grid_steps(rope_dims: int, most: int) -> tuple[int, ...]:
    """Steps of a grid of R/2 channels over ``most`` frequencies: powers of two, and the widest that fits."""
    channels = rope_dims // 2
    widest = (most - 1) // (channels - 1) if channels > 1 else 1
    return tuple(sorted({1 << power for power in range(widest.bit_length())} | {widest}))

"""What every step that packs linear weights as integers does: which weights, which bits, what it refuses.

Shapes: W [out,in], scales [out,in/group].
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from anymla.errors import UnsupportedModelError
from anymla.methods.base import Changed, Facts, Phase, Plan, SweptMethod, Unheard
from anymla.modeling.packing import CACHE_BITS, Packing
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.modeling.zeros_spec import ZerosSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from anymla.methods.integers.packed import Rounded
    from anymla.sweep.layer import Layer, Observer

PLAIN = 16  # bits of a weight that stays as it is
NOT_LINEAR = ("gpt2",)  # families that multiply by transformers' Conv1D


class IntegerWeights(SweptMethod):
    """Settings of a step that packs the linear weights of every decoder layer with softmax attention.

    A converted attention keeps what makes its cache in 16 bits: latents, rope keys, shared keys and values, and what
    rebuilds them; and an output projection whose inputs the group does not divide, as mfa may make it. In a stock
    attention keys and values get at least four bits. Embeddings, norms and head stay too.

    ``zeros: true`` needs the modelling files of the checkpoint. Without it, a stock model stays one for every engine.
    """

    phase: ClassVar[Phase] = Phase.WEIGHTS
    saves: ClassVar[tuple[str, ...]] = ("weights",)
    excludes: ClassVar[tuple[str, ...]] = ("billm", "rtn", "hqq", "gptq")
    needs: ClassVar[tuple[str, ...]] = ("compressed_tensors",)  # modules that are imported
    extra: ClassVar[str] = "weights"  # of anymla's, that installs them

    bits: Literal[2, 3, 4, 8, 16] = Field(
        4, description="Bits of a weight, beside its share of a scale; 16 leaves all as they are."
    )
    group: Literal[16, 32, 64, 128] = Field(
        64, description="Inputs that share a scale. Fewer lose less and cost more: 16 bits of scale for each group."
    )

    zeros: bool = Field(
        False,
        description="Keep a zero point of 16 bits beside each scale, so that integers need not be around zero. tune "
        "with train: zero_points learns these. It makes a checkpoint of anymla's own format, and needs 4 or 8 bits.",
    )

    @property
    def packing(self) -> Packing:
        """What the step makes of a layer."""
        return Packing(bits=self.bits, group=self.group)

    def refuses(self, model: ModelSpec) -> str | None:
        """Why the weights of this model cannot be packed."""
        if self.zeros and not CACHE_BITS <= self.bits < PLAIN:
            return f"zeros: integers of {self.bits} bits have no zero points here: give bits {CACHE_BITS} or 8"
        if self.bits == PLAIN:
            return None
        if missing := [module for module in self.needs if importlib.util.find_spec(module) is None]:
            return f"it needs {missing[0]}, which is not installed: pip install 'anymla[{self.extra}]'"
        if any(layer.holds_packed for layer in model.layers):
            return "its weights are packed already"
        if model.text_model_type in NOT_LINEAR:
            return "its projections are no linear layers, and only these are packed"
        if model.experts:
            return "its experts are one tensor each, and only linear layers are packed"
        sizes = sorted({size for layer in model.layers for size in _inputs(layer, model)})
        if rest := [size for size in sizes if size % self.group]:
            fits = [group for group in (128, 64, 32, 16) if gcd(*sizes) % group == 0]
            advice = f"give group {fits[0]}" if fits else "no group does"
            return f"groups of {self.group} do not divide {rest[0]} inputs: {advice}"
        return None

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """The same model, with packed weights in all layers that have softmax attention; ``choices``: their bits."""
        if self.bits == PLAIN:
            return Plan(after=model, choices=(None,) * len(model.layers))
        zeros = ZerosSpec(group=self.group) if self.zeros else None
        layers = tuple(
            layer if layer.attention is None else replace(layer, integers=self.packing, zeros=zeros)
            for layer in model.layers
        )
        chosen = tuple(None if layer.integers is None else self.bits for layer in layers)
        return Plan(after=replace(model, layers=layers), choices=chosen)

    def observer(self, layer: Layer) -> Observer:
        """Nothing of the original layer is asked."""
        return Unheard()

    @abstractmethod
    def scale_of(self, weight: Tensor, bits: int) -> Tensor:
        """Scales [out,in/group] of W [out,in] in float32, for integers of so many ``bits``."""

    def rounded(self, layer: Layer, linears: dict[str, nn.Linear], bits: dict[str, int]) -> dict[str, Rounded]:
        """Scales of ``linears``, as they are saved, and the weights to be rounded by them; all by name in the layer."""
        from anymla.methods.integers.packed import Rounded
        from anymla.modeling.zeroed_linear import middles

        found = {}
        for name, linear in linears.items():
            weight, zero = linear.weight.float(), None
            if self.zeros:
                zero = middles(weight, self.group).to(layer.saved).float()
                weight = weight - zero.repeat_interleave(self.group, 1)
            scale = self.scale_of(weight, bits[name]).to(layer.saved).float()
            found[name] = Rounded(weight=weight, scale=scale, zero=zero)
        return found

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts packed linear modules in the places of plain ones."""
        from anymla.architectures.packed import packed_linears
        from anymla.methods.integers.packed import IntegerLinear
        from anymla.modeling.zeroed_linear import ZeroedLinear

        bits = packed_linears(layer.module, layer.planned)
        linears = {name: layer.module.get_submodule(name) for name in bits}
        for name, linear in linears.items():
            if linear.in_features % self.group:
                raise UnsupportedModelError(
                    f"{layer.name}.{name} has {linear.in_features} inputs, which groups of {self.group} do not divide: "
                    "give another group"
                )
        if not linears:
            raise UnsupportedModelError(f"{layer.name} has no linear layers that {self.name} could pack")
        before = sum(linear.weight.numel() for linear in linears.values())
        spec, size = layer.planned, 0
        for name, found in self.rounded(layer, linears, bits).items():
            packed = IntegerLinear.of(found, linears[name], bits=bits[name], group=self.group)
            layer.module.set_submodule(
                name, packed if found.zero is None else ZeroedLinear.of(packed, found.zero.to(packed.dtype))
            )
            size += packed.packed_bytes(layer.saved.itemsize)
            size += 0 if found.zero is None else found.zero.numel() * layer.saved.itemsize
        told = {"layer": layer.index, "bits_per_weight": 8 * size / before}
        if spec.zeros is not None:
            spec = replace(spec, zeros=replace(spec.zeros, layer=layer.name, linears=tuple(linears)))
        return Changed(spec=spec, result=told)


def _inputs(layer: LayerSpec, model: ModelSpec) -> set[int]:
    """Numbers of inputs that a layer's packed weights have, as far as the config says."""
    if (attention := layer.attention) is None:
        return set()
    heads = {attention.num_heads * attention.head_dim} if layer.kind is None else set()
    neurons = None if layer.width is None else layer.width.neurons
    return {model.hidden_size, neurons or model.intermediate_size} | heads

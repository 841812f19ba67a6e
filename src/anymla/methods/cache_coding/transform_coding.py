"""The method `transform_coding`: keys and values in a basis where few bits lose little, bits where the energy is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from anymla.methods.base import Changed, Facts, Paper, Phase, Plan, Survey, Unheard
from anymla.methods.cache_coding.latent_plan import LatentCoding, plan_latents
from anymla.methods.cache_coding.papers import TRANSFORM_CODING
from anymla.methods.cache_coding.plan import (
    Energies,
    LayerCoding,
    byte_budget,
    exact_bytes,
    plan_layers,
    rows_held,
)
from anymla.methods.effort import EffortMethod
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


WINDOW = 16  # latest tokens that are seen exactly, unless the settings say so


class TransformCoding(EffortMethod):
    """Settings of a cache of codes. One rate-distortion problem over all layers gives the bases and bits.

    After the steps mla and mfa, the latent is coded in its principal axes. The rope key is coded before rope, in its
    channels. After lorc, keys and values of low rank are coded in their principal axes. The step before has then
    decided the cost of decoding, and ``decode_cost`` has no effect.
    """

    name: ClassVar[str] = "transform_coding"
    paper: ClassVar[Paper] = TRANSFORM_CODING
    phase: ClassVar[Phase] = Phase.CACHE
    summary: ClassVar[str] = "keys and values in a few bits each: more bits for the axes whose errors cost more"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    excludes: ClassVar[tuple[str, ...]] = ("kvquant",)

    kv_cache: float = Field(
        0.125,
        gt=0,
        le=1,
        description="Share of the bytes that the original's KV cache has in 16 bits, 0 < x <= 1. 1 codes nothing.",
    )
    decode_cost: float | Literal["any"] = Field(
        2.0,
        description="Most multiply-adds per cached token and layer at decode, as a multiple of the original "
        "attention's. Bases then mix few heads. any: no limit, and keys are rebuilt from the best axes of all heads.",
    )
    context: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Tokens in the cache at which kv_cache is the share of all its bytes, exact tokens too. A layer "
        "with a sliding window holds fewer of them, so each of these may have more bits. Default: none. kv_cache is "
        "then the share of a token's bytes, and all layers count the same.",
    )
    first_tokens: int = Field(
        4, ge=0, le=1024, description="Tokens at the start of every text that stay exact, for a constant size."
    )
    exact_window: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Latest tokens that each query sees exactly, 2 or more, at a constant size. 0: none. Default: 16, "
        "or none after mla, mfa and lorc.",
    )
    calibration_tokens: int = Field(16384, ge=256, le=MOST, description="Tokens of calibration text to use.")
    calibration_length: int = Field(
        512, ge=8, le=MOST, description="Tokens per calibration window (at most the model's context)."
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model has no coded cache."""
        from anymla.methods.cache_coding.refusals import coded_refusal

        if (window := self.window(model)) == 1:
            return "exact_window is 1, which would keep nothing: it must be 0, or 2 or more"
        if min(self.calibration_length, model.max_position_embeddings) < 2 * window:
            return f"exact_window {window} needs calibration windows of twice as many tokens, to see beyond it"
        if _converted(model) and window:
            return f"exact_window is {window}, and a coded latent has none: it must be 0"
        if any(layer.mfa is not None and layer.mfa.value_gate for layer in model.layers):
            return "its value gates are still to be trained: let `tune` fold them, or leave mfa's value_gate out"
        return coded_refusal(model)

    def window(self, model: ModelSpec) -> int:
        """The latest tokens that are seen exactly."""
        return (0 if _converted(model) else WINDOW) if self.exact_window is None else self.exact_window

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """Codes for every layer with softmax attention, typical ones without ``facts``.

        ``choices``: LayerCoding, in a model with a latent or low rank LatentCoding.
        """
        places = {} if self.kv_cache == 1 else model.attention_layers
        known = facts or [None] * len(model.layers)
        attentions, window = [*places.values()], self.window(model)
        exact = sum(exact_bytes(model.layers[index], self, window) for index in places)
        planned: dict[int, LayerCoding | LatentCoding] = {}
        if _converted(model) and places:
            specs, found = [model.layers[index] for index in places], [known[index] for index in places]
            budget, held = byte_budget(attentions, self, exact), [*rows_held(attentions, self)]
            planned |= zip(places, plan_latents(specs, found, budget, held), strict=True)
        elif places:
            energies = [self._energies(attention, known[index]) for index, attention in places.items()]
            made = zip(places, plan_layers(attentions, energies, self, exact), strict=True)
            planned |= {index: layer.model_copy(update={"facts": known[index]}) for index, layer in made}
        layers = tuple(
            self._coded(layer, planned[index], window) if index in planned else layer
            for index, layer in enumerate(model.layers)
        )
        return Plan(after=replace(model, layers=layers), choices=tuple(map(planned.get, range(len(layers)))))

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """Moments of keys and values, and what their errors cost."""
        from anymla.methods.cache_coding.energies import EnergySurvey

        return EnergySurvey(self, self.window(model))

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: the survey has seen it all."""
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts an attention whose cache is coded in the place of the layer's own."""
        from anymla.methods.cache_coding.build import build_transformed, build_transformed_latent

        coding: LayerCoding | LatentCoding = layer.choice
        if isinstance(coding, LatentCoding):
            attention, lost = build_transformed_latent(layer, coding)
            told = coding.told()
        else:
            attention, lost = build_transformed(layer, coding)
            told = _told(coding)
        layer.module.set_submodule(layer.attention_path, attention)
        return Changed(spec=attention.layer_spec, result={"layer": layer.index, **told, "error": lost})

    def _coded(self, old: LayerSpec, layer: LayerCoding | LatentCoding, window: int) -> LayerSpec:
        """The layer as it will be."""
        if old.attention is None:
            raise ValueError("a layer without softmax attention has no coded cache")
        if isinstance(layer, LatentCoding):
            return replace(old, coded=layer.spec(self.first_tokens), attention_bytes=None)
        return replace(old, coded=layer.spec(old.attention, self.first_tokens, window), attention_bytes=None)

    def _energies(self, attention: AttentionSpec, facts: dict[str, Any] | None) -> Energies:
        if facts is None:
            return Energies.typical(attention, self)
        return Energies(keys=facts["key_energies"], values=facts["value_energies"])


def _converted(model: ModelSpec) -> bool:
    """Whether a step before has made what its layers cache."""
    return any(layer.kind is not None for layer in model.layers)


def _told(coding: LayerCoding) -> dict[str, Any]:
    """What a report says of a layer."""
    sizes = {"key": coding.key_bits, "value": coding.value_bits}
    kept = {f"{name}_coefficients": sum(map(bool, bits)) for name, bits in sizes.items()}
    means = {f"{name}_bits": sum(bits) / len(bits) for name, bits in sizes.items()}
    blocks = {"key_block": coding.key_block, "value_block": coding.value_block}
    return {"key_basis": coding.key_basis, **blocks, **kept, **means, "predicted_kl": coding.predicted_kl}

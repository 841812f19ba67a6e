"""The method `kvquant`: non-uniform tables for keys before rope and for values, outliers kept apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan, Survey, Unheard
from anymla.methods.cache_coding.papers import KVQUANT
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class Surveyed(BaseModel):
    """What is known of a layer that will be coded: what the survey says of it; None before."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    facts: Any = Field(None, exclude=True, repr=False)


class KVQuant(LayerMethod):
    """Settings of a cache that is quantised as KVQuant does it.

    Keys are coded before rope, with a static range per channel. Values have a range per token. All channels of a layer
    share one table of levels for keys and one for values. The levels come from k-means, weighted by the Fisher
    information. Outliers and the first tokens are stored exactly. After the steps mla, mfa and lorc, both vectors that
    they cache are coded instead, before rope, and both like keys.

    Deviations from the paper: every token has the same number of outliers, so that all rows of the cache are equally
    long. They are the numbers farthest from their levels. The paper's are those outside the range. With ``q_norm``,
    codes are chosen by the changed levels. Batches, padding and grouped-query attention work. The paper's code refuses
    them.
    """

    name: ClassVar[str] = "kvquant"
    paper: ClassVar[Paper] = KVQUANT
    phase: ClassVar[Phase] = Phase.CACHE
    summary: ClassVar[str] = "keys before rope and values in 2 to 8 bits: non-uniform levels, exact outliers"
    saves: ClassVar[tuple[str, ...]] = ("cache",)
    excludes: ClassVar[tuple[str, ...]] = ("transform_coding",)

    bits: Literal[2, 3, 4, 5, 6, 8, 16] = Field(
        4, description="Bits of every key and value. 16 leaves them in the model's own dtype."
    )
    codec: Literal["nuq", "int", "fp8"] = Field(
        "nuq",
        description="nuq: levels fitted to the text, and exact outliers. int (4 or 8 bits) and fp8 (8 bits): the grids "
        "of engines, with a scale per token and block and nothing else.",
    )
    block: int = Field(32, ge=1, le=MOST, description="Numbers that share a scale, for int and fp8.")
    sparse: float = Field(
        0.01, ge=0, le=0.25, description="Share of a token's numbers that stay in 16 bits, each with its index."
    )
    first_tokens: int = Field(
        4, ge=0, le=1024, description="Tokens at the start of every text that stay exact, for a constant size."
    )
    q_norm: bool | None = Field(
        None,
        description="Move the levels so that mean and deviation stay the same. Default: only at 2 bits, as in the "
        "paper.",
    )
    calibration_tokens: int = Field(16384, ge=256, le=MOST, description="Tokens of calibration text to use.")

    @model_validator(mode="after")
    def _fits_together(self) -> KVQuant:
        if (widths := {"int": (4, 8, 16), "fp8": (8, 16)}.get(self.codec)) and self.bits not in widths:
            raise ValueError(f"codec {self.codec} has bits of {' or '.join(map(str, widths))}, got {self.bits}")
        return self

    def refuses(self, model: ModelSpec) -> str | None:
        """Why this model has no coded cache."""
        from anymla.methods.cache_coding.refusals import coded_refusal

        return coded_refusal(model)

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """Codes for every layer with softmax attention; ``choices``: Surveyed."""
        known = [None if facts is None else facts[index] for index in range(len(model.layers))]
        layers = tuple(self._coded(layer, fact) for layer, fact in zip(model.layers, known, strict=True))
        chosen = tuple(
            None if layer.attention is None else Surveyed(facts=fact)
            for layer, fact in zip(model.layers, known, strict=True)
        )
        return Plan(after=replace(model, layers=layers), choices=chosen)

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """What keys and values are, and what their errors cost."""
        from anymla.methods.cache_coding.survey import KeyValueSurvey

        return KeyValueSurvey(self.first_tokens)

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: the survey has seen it all."""
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts an attention whose cache is coded in the place of the layer's own."""
        from anymla.methods.cache_coding.nuq import build_quantised

        attention, lost = build_quantised(layer, self)
        layer.module.set_submodule(layer.attention_path, attention)
        result = {"layer": layer.index, "bits": self.bits, "predicted_kl": lost}
        return Changed(spec=attention.layer_spec, result=result)

    @property
    def moves_levels(self) -> bool:
        """Whether Q-Norm is on."""
        return self.bits == 2 if self.q_norm is None else self.q_norm

    def coding(self, width: int, *, per_token: bool) -> Coding:
        """That of ``width`` numbers per token; ``per_token``: with a range of each token's own."""
        if self.bits == 16 or not width:
            return Coding(bits=((16, width),), kind="plain")
        if self.codec != "nuq":
            return Coding(bits=((self.bits, width),), kind=self.codec, block=min(self.block, width))
        outliers = max(1, round(self.sparse * width)) if self.sparse and width > 1 else 0
        return Coding(bits=((self.bits, width),), token_scale=per_token, outliers=outliers)

    def _coded(self, old: LayerSpec, facts: dict[str, Any] | None) -> LayerSpec:
        """The layer as it will be."""
        if old.attention is None:
            return old
        return replace(old, coded=self._spec(old, facts), attention_bytes=None)

    def _spec(self, old: LayerSpec, facts: dict[str, Any] | None) -> CodedSpec:
        (keys, values), basis = old.coded_sizes, "own" if old.coded is None else "axes"
        return CodedSpec(
            keys=self.coding(keys, per_token=False),
            values=self.coding(values, per_token=old.kind is None),
            key_basis=basis,
            value_basis=basis,
            first_tokens=self.first_tokens,
            rope_scale=1.0 if facts is None else facts["rope_scale"],
        )

"""What a model is: its layers' attention, what their caches hold, and how large its weights are.

One of the modelling files that travel with every converted checkpoint; it needs the standard library only. A method
turns one ModelSpec into another; modelling, exports, cards and the account read nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .attention_spec import AttentionSpec
from .coding_spec import CodedSpec
from .described import checked, names, shortened
from .grouped_spec import GroupedSpec
from .latent_spec import LatentSpec
from .mfa_spec import MfaSpec
from .packed_spec import PackedSpec
from .packing import Packing
from .shared_spec import SharedSpec
from .slot_spec import Slot
from .width_spec import WidthSpec
from .zeros_spec import ZerosSpec

VERSION = 1
KEY = "anymla"  # in config.json: {"version": .., "layers": [..]}
OLD_KEY = "mla_layers"  # what anymla 0.1 wrote
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions: the scaling type, the base, and the scaling's own settings."""

    rope_type: str
    theta: float
    settings: Mapping[str, Any]


# What may stand in the stock attention's place. Where a latent is coded the first of both says what the cache holds.
KINDS: dict[str, Any] = {
    "coded": CodedSpec,
    "latent": LatentSpec,
    "grouped": GroupedSpec,
    "mfa": MfaSpec,
    "shared": SharedSpec,
}
TOGETHER = ({"latent", "coded"}, {"mfa", "coded"}, {"latent", "shared"})  # that one layer may have


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: its attention, and one of ``KINDS`` that holds its cache, or two that go ``TOGETHER``.

    ``attention``: None in a layer without softmax attention. ``module``: path of the converted attention in the model.
    ``packed``: which of its linears hold binarised weights. ``integers``: how its linears are packed as integers, which
    config.json says in ``quantization_config``. ``zeros``: which of these have zero points. ``width``: its sizes, where
    they are not its model's.
    ``attention_bytes``, ``other_bytes``: of the weights of a stock or packed attention, and of all others of this
    layer; None where only the config was read.
    """

    attention: AttentionSpec | None = None
    latent: LatentSpec | None = None
    coded: CodedSpec | None = None
    grouped: GroupedSpec | None = None
    mfa: MfaSpec | None = None
    shared: SharedSpec | None = None
    packed: PackedSpec | None = None
    width: WidthSpec | None = None
    zeros: ZerosSpec | None = None
    module: str | None = None
    attention_bytes: int | None = None
    other_bytes: int | None = None
    integers: Packing | None = None

    @property
    def parts(self) -> tuple[AttentionSpec, LatentSpec]:
        """The attention and the latent of a converted layer.

        Raises:
            ValueError: it is not converted.
        """
        if self.attention is None or self.latent is None:
            raise ValueError(f"the layer at {self.module} has no latent attention")
        return self.attention, self.latent

    @property
    def codes(self) -> CodedSpec:
        """The codes of a layer whose cache is coded.

        Raises:
            ValueError: it is not.
        """
        if self.coded is None:
            raise ValueError(f"the layer at {self.module} has no coded cache")
        return self.coded

    @property
    def factorised(self) -> MfaSpec:
        """The multi-matrix factorisation attention of a layer.

        Raises:
            ValueError: it has none.
        """
        if self.mfa is None:
            raise ValueError(f"the layer at {self.module} has no factorised attention")
        return self.mfa

    @property
    def kind(self) -> Any:
        """What stands in the stock attention's place, one of ``KINDS``; None where that is as it was."""
        return next((kind for name in KINDS if (kind := getattr(self, name)) is not None), None)

    @property
    def coded_sizes(self) -> tuple[int, int]:
        """Numbers of both vectors that codes may hold per token: keys and values, or latent and rope key."""
        if (latent := self.latent or self.mfa) is not None:
            return latent.kv_lora_rank, latent.qk_rope_head_dim
        if self.coded is not None:  # of low rank
            return self.coded.keys.width, self.coded.values.width
        size = 0 if self.attention is None else self.attention.cached_numbers // 2
        return size, size

    @property
    def takes_map(self) -> bool:
        """Whether it attends by another layer's attention map."""
        return self.shared is not None and self.shared.source_layer is not None

    @property
    def stock(self) -> bool:
        """Whether all modules of the layer are those of the original's class, in the model's sizes."""
        return self.kind is None and self.packed is None and self.width is None and self.zeros is None

    @property
    def replaced(self) -> AttentionSpec | None:
        """The attention of a layer that has another module than the original; None in others."""
        return None if self.kind is None else self.attention

    @property
    def encodes_keys(self) -> bool:
        """Whether keys of a coded cache are put into their basis after the projection: they are not linear in x."""
        return self._in_basis("key_basis") and not (self.attention is None or self.attention.linear_queries)

    @property
    def encodes_values(self) -> bool:
        """The same of values."""
        return self._in_basis("value_basis") and not (self.attention is None or self.attention.linear_values)

    def _in_basis(self, name: str) -> bool:
        return self.coded is not None and getattr(self.coded, name) != "own"

    @property
    def makes_values(self) -> bool:
        """Whether a converted attention makes the original's values, and not the latent of x alone."""
        if self.attention is None or (self.latent is None and self.mfa is None):
            return False
        return not self.attention.linear_values or (self.latent is not None and self.latent.exact_window > 0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What the layer's cache holds."""
        if (attention := self.attention) is None:
            return ()
        window = None if attention.cache_window is None else max(0, attention.cache_window - 1)
        if self.kind is None:
            width = attention.stored_numbers // 2
            return tuple(Slot(name=name, width=width, tokens=window) for name in ("keys", "values"))
        slots: tuple[Slot, ...] = self.kind.slots(attention, window)
        return slots

    def uncoded(self) -> LayerSpec:
        """The layer with the same weights, and a cache of numbers: the latent itself, or all coefficients."""
        latent = self.latent is not None or self.mfa is not None
        return self if self.coded is None else replace(self, coded=None if latent else self.coded.plain())

    @property
    def holds_packed(self) -> bool:
        """Whether some of its linears hold binarised weights or integers."""
        return self.packed is not None or self.integers is not None

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of the layer: fields at their defaults are left out, sizes of weights are too."""
        named = {
            "module": self.module,
            "attention": shortened(self.attention),
            **{name: kind.to_dict() for name in KINDS if (kind := getattr(self, name)) is not None},
            "packed": None if self.packed is None else self.packed.to_dict(),
            "width": None if self.width is None else self.width.to_dict(),
            "zeros": None if self.zeros is None else self.zeros.to_dict(),
        }
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of(cls, described: Any) -> LayerSpec:
        """The layer that ``to_dict`` described.

        Raises:
            ValueError: it is no such description; the message says which field.
        """
        described = checked(cls, described, skipped=("attention_bytes", "other_bytes", "integers"))
        given = {name: kind for name in KINDS if (kind := described.get(name)) is not None}
        if len(given) > 1 and {*given} not in TOGETHER:
            raise ValueError(f"LayerSpec: a layer has {' or '.join(given)}, not both")
        attention = None if (found := described.get("attention")) is None else AttentionSpec.of(found)
        kinds = {name: KINDS[name].of(kind, attention) for name, kind in given.items()}
        packed = None if (found := described.get("packed")) is None else PackedSpec.of(found)
        width = None if (found := described.get("width")) is None else WidthSpec.of(found)
        zeros = None if (found := described.get("zeros")) is None else ZerosSpec.of(found)
        rest = {"module": described.get("module"), "packed": packed, "width": width, "zeros": zeros}
        layer = cls(attention=attention, **rest, **kinds)
        if layer.coded is not None:
            latent = layer.latent is not None or layer.mfa is not None
            layer.coded.check(*replace(layer, coded=None).coded_sizes, gauge=not latent)
        if layer.latent is not None and layer.latent.exact_window and (layer.coded or layer.shared):
            raise ValueError("LayerSpec: a coded latent has no exact window, nor has one whose layer shares a map")
        return layer


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder model: what planning, conversion, exports and the account need to know.

    ``text_model_type``: whose attention it has, another one than ``model_type`` in a vision-language model.
    ``other_block``: what outside attention is not as in Llama; ``beyond``: what of its attention no engine's latent
    attention does. ``experts``: whether some MLP is a mixture of experts; ``routed_experts``: how many a router chooses
    among, ``experts_per_token`` of them, 0 where it chooses none or whole groups. ``outside_bytes``: of all weights
    outside the layers; None where only the config was read.
    """

    model_type: str
    text_model_type: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str
    rope: RopeSpec | None
    other_block: str | None
    beyond: str | None
    experts: bool
    has_vision: bool
    layers: tuple[LayerSpec, ...]
    outside_bytes: int | None = None
    routed_experts: int = 0
    experts_per_token: int = 0
    version: int = field(default=VERSION)

    @property
    def attention_layers(self) -> dict[int, AttentionSpec]:
        """The attention of the layers that have one, by their index."""
        return {index: layer.attention for index, layer in enumerate(self.layers) if layer.attention is not None}

    @property
    def cached_numbers(self) -> int:
        """Numbers that one layer of the original caches per token (the largest, where layers differ)."""
        return max(spec.stored_numbers for spec in self.attention_layers.values())


def config_entry(layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    """What ``config.json`` holds under ``KEY``."""
    return {"version": VERSION, "layers": [layer.to_dict() for layer in layers]}


def layers_of(config: Mapping[str, Any]) -> tuple[LayerSpec, ...] | None:
    """The layers that a parsed ``config.json`` describes, in either form; None where it describes none.

    Raises:
        ValueError: the description is broken, or of a newer anymla.
    """
    if (entry := config.get(KEY)) is None:
        return _old_layers(config.get(OLD_KEY))
    if not isinstance(entry, Mapping) or not isinstance(entry.get("layers"), list):
        raise ValueError(f"{KEY} must hold a version and layers")
    if not isinstance(version := entry.get("version"), int) or version > VERSION:
        raise ValueError(f"{KEY}: version {version!s:.20} is not known here, only those up to {VERSION}: update anymla")
    return tuple(LayerSpec.of(layer) for layer in entry["layers"])


def _old_layers(described: Any) -> tuple[LayerSpec, ...] | None:
    """Layers as anymla 0.1 listed them, the converted ones only: the arguments of its LatentAttention."""
    if described is None:
        return None
    if not isinstance(described, list) or not all(isinstance(layer, Mapping) for layer in described):
        raise ValueError(f"{OLD_KEY} must be a list of layers")
    return tuple(_old_layer(layer) for layer in described)


def _old_layer(layer: Mapping[str, Any]) -> LayerSpec:
    rest = {name: value for name, value in layer.items() if name not in ("module", "query_bias", "bias")}
    latent = {name: rest.pop(name) for name in names(LatentSpec) if name in rest}
    return LayerSpec.of(
        {"module": layer.get("module"), "attention": rest, "latent": latent | {"biases": layer.get("bias", True)}}
    )

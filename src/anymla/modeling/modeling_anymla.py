"""Models of transformers whose attention was converted to multi-head latent attention by anymla, or weights packed.

``AnymlaLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with a ConvertedAttention in the layers that its
config names, and so for every other class: they are made when they are first asked for. With the files that it imports,
a copy of this one travels with every converted checkpoint, so that ``from_pretrained(folder,
trust_remote_code=True)`` works without anymla.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import Cache

from .arguments import CACHE_NAMES
from .coded_attention import CodedAttention
from .coded_latent import CodedLatentAttention, CodedMfaAttention
from .coded_window import CodedWindowAttention
from .coding_spec import CodedSpec
from .exact_window import ExactWindowAttention
from .grouped_attention import GroupedAttention
from .grouped_spec import GroupedSpec
from .latent_attention import LatentAttention
from .latent_spec import LatentSpec
from .mfa_attention import MfaAttention
from .mfa_spec import MfaSpec
from .model_classes import ReplacedAttention, made_class
from .packed_linear import PackedLinear
from .rows_attention import RowsAttention
from .shared_attention import MapSourceAttention, SharedAttention, hand_maps
from .shared_latent import MapSourceLatentAttention, SharedLatentAttention
from .shared_spec import SharedSpec
from .spec import KEY, LayerSpec, config_entry, layers_of
from .zeroed_linear import ZeroedLinear

PREFIX = "Anymla"
CODE_BUFFERS = (r"\.(key|value)_codec\.levels$", r"\.inv_freq$")  # that a cache of numbers has not


class LatentModelMixin(ReplacedAttention):
    """Puts another attention into the stock model, where its config says, before any weight is loaded.

    ``from_pretrained(folder, codec="none")`` turns the codes of a coded cache off: it then holds numbers in the dtype
    of the model, in the same basis.

    Raises:
        ValueError: another ``codec``.
    """

    def __init__(self, config: Any, *args: Any, codec: str | None = None, **kwargs: Any) -> None:
        if codec not in (None, "none"):
            raise ValueError(f"codec must be none, or not be given at all, got {codec!s:.40}")
        if codec and (coded := layers_of(config.to_dict())):
            setattr(config, KEY, config_entry(tuple(layer.uncoded() for layer in coded)))
        super().__init__(config, *args, **kwargs)
        if codec:
            known = self._keys_to_ignore_on_load_unexpected or ()  # type: ignore[has-type]
            self._keys_to_ignore_on_load_unexpected = {*known, *CODE_BUFFERS}
        layers = layers_of(config.to_dict()) or ()
        for layer in layers:
            narrow_layer(self, layer)
            if layer.replaced is not None:
                replace_attention(self, layer)
            pack_linears(self, layer)
            add_zeros(self, layer)
        if (sharing := next((str(layer.module) for layer in layers if layer.shared is not None), None)) is not None:
            hand_maps(self.get_submodule(decoder_path(sharing)))  # type: ignore[attr-defined]

    @property
    def peft_config(self) -> dict[str, Any]:
        """What peft has put on the model, by the adapters' names."""
        if "_peft_config" not in vars(self):
            raise AttributeError("no adapter")
        config: dict[str, Any] = vars(self)["_peft_config"]
        return config

    @peft_config.setter
    def peft_config(self, config: dict[str, Any]) -> None:
        """Warns of modules that an adapter targets and that only the original has: peft itself passes over them."""
        vars(self)["_peft_config"] = config
        names = [name.rpartition(".")[2] for name, _ in self.named_modules()]  # type: ignore[attr-defined]
        for adapter, settings in config.items():
            targets = getattr(settings, "target_modules", None)
            targets = targets if isinstance(targets, list | set | tuple) else ()
            if missing := sorted(each for each in targets if each.rpartition(".")[2] not in names):
                warnings.warn(
                    f"adapter {adapter!r} targets {', '.join(missing)}, which a converted model does not have: that "
                    "part of it is lost. Put it on the original: `anymla convert ORIGINAL --adapter ADAPTER`",
                    stacklevel=2,
                )

    @peft_config.deleter
    def peft_config(self) -> None:
        del vars(self)["_peft_config"]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As always; what needs room of its own has it before assisted decoding asks the cache to record."""
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = next((model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs), None)
        parts = [part for part in self.modules() if isinstance(part, ExactWindowAttention | RowsAttention)]  # type: ignore[attr-defined]
        for attention in parts if isinstance(cache, Cache) else ():
            attention.make_room(cache)
        if parts and cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()
        return made


def replace_attention(model: Any, layer: LayerSpec) -> None:
    """Replaces the attention module of ``layer`` in ``model``; its weights start as the model's own do."""
    original = model.get_submodule(layer.module)
    attention = attention_class(layer)(original, model.config.get_text_config(), layer)
    model.set_submodule(layer.module, attention.apply(model._init_weights))


def narrow_layer(model: Any, layer: LayerSpec) -> None:
    """Makes a decoder layer of ``model`` anew, where ``layer`` has sizes of its own."""
    if (width := layer.width) is None:
        return
    config = model.config.get_text_config()
    original, own = model.get_submodule(width.layer), width.config_of(config)
    made = type(original)(own, int(width.layer.rpartition(".")[2]))
    for part in made.modules():  # what is set later, as how to attend, is set for all layers at once
        if getattr(part, "config", None) is own:
            part.config = config
    model.set_submodule(width.layer, made.apply(model._init_weights))


def pack_linears(model: Any, layer: LayerSpec) -> None:
    """Makes room for packed weights in the linears of ``layer`` in ``model`` that have them."""
    if (packed := layer.packed) is None:
        return
    for name, (out, into) in packed.linears.items():
        path = f"{packed.layer}.{name}"
        bias = model.get_submodule(path).bias is not None
        model.set_submodule(path, PackedLinear(packed, out, into, bias=bias))


def add_zeros(model: Any, layer: LayerSpec) -> None:
    """Makes room for zero points beside the linears of ``layer`` in ``model`` that have them."""
    if (zeros := layer.zeros) is None:
        return
    for name in zeros.linears:
        path = f"{zeros.layer}.{name}"
        model.set_submodule(path, ZeroedLinear.over(model.get_submodule(path), zeros.group))


def decoder_path(attention: str) -> str:
    """Where the decoder is whose layers hold the attention at this path: before the list of layers."""
    parts = attention.split(".")
    return ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdigit()) - 1])


def attention_class(layer: LayerSpec) -> type[Any]:
    """The attention that a converted layer has, a kind of ConvertedAttention."""
    match layer.kind:
        case CodedSpec() if layer.latent is not None:
            return CodedLatentAttention
        case CodedSpec() if layer.mfa is not None:
            return CodedMfaAttention
        case CodedSpec(exact_window=window):
            return CodedWindowAttention if window else CodedAttention
        case LatentSpec() if layer.shared is not None:
            return SharedLatentAttention if layer.takes_map else MapSourceLatentAttention
        case LatentSpec(exact_window=window):
            return ExactWindowAttention if window else LatentAttention
        case GroupedSpec():
            return GroupedAttention
        case MfaSpec():
            return MfaAttention
        case SharedSpec(source_layer=source):
            return MapSourceAttention if source is None else SharedAttention
    raise ValueError(f"the layer at {layer.module} is not converted")


def __getattr__(name: str) -> Any:
    """Makes the class ``name``: a stock model or config of transformers, with the prefix Anymla."""
    return made_class(name, PREFIX, LatentModelMixin, globals())

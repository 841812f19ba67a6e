"""Which layers can use the attention map of which, from the config alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from anymla.architectures.families import DROP_ARGUMENTS, FAMILIES, OWN_CACHE, SINKS
from anymla.errors import InfeasibleError
from anymla.modeling.spec import LayerSpec, ModelSpec

PROTECTED = (2, 2)  # first and last layers that a search leaves alone


def sharing_refusal(model: ModelSpec) -> str | None:
    """Why layers of ``model`` cannot share attention maps, or None."""
    if any(layer.coded is not None for layer in model.layers):
        return "its cache is coded already"
    if any(layer.shared is not None for layer in model.layers):
        return "its layers share attention maps already"
    if any(layer.kind is not None and layer.latent is None for layer in model.layers):
        return "its attention is not stock any more: put shared_attention before the step that changed it"
    if any(layer.width is not None and layer.width.heads for layer in model.layers):
        return "its layers have different numbers of heads, and maps are shared head by head: give saap heads: 1.0"
    family, latents = FAMILIES[model.text_model_type], [layer for layer in model.layers if layer.latent is not None]
    if any(latent.exact_window for _, latent in (layer.parts for layer in latents)):
        return "its latent has an exact window, whose map is in two parts: give the step mla exact_window 0"
    bent = family.clip or any(spec.qk_norm or not spec.linear_keys for spec in model.attention_layers.values())
    if latents and bent:
        return "its latents need keys as well as values, because norms or clips are before them: put it before mla"
    if model.text_model_type in DROP_ARGUMENTS:
        return "layers of its family give their attention known arguments only, and a map is handed on by another one"
    if family.beyond == SINKS:
        return "its attention has sinks, which are no part of the map that is handed on"
    return OWN_CACHE if family.all_layers_attend else None


def source_of(model: ModelSpec, layer: int, shared: Collection[int]) -> int | None:
    """The layer whose map ``layer`` uses, where the layers ``shared`` have none of their own; None where none fits.

    It is the nearest one before it whose attention has the same heads, rope and window.
    """
    attention = model.layers[layer].attention
    before = (index for index in reversed(range(layer)) if index not in shared)
    return next((index for index in before if model.layers[index].attention == attention), None)


def layers_in(spans: Sequence[Sequence[int]]) -> list[int]:
    """The layers of ``spans``, both ends included."""
    return [layer for first, last in spans for layer in range(first, last + 1)]


def spans_refusal(model: ModelSpec, spans: Sequence[Sequence[int]]) -> str | None:
    """Why these spans cannot be shared, or None."""
    layers = layers_in(spans)
    if any(first > last or first < 0 or last >= len(model.layers) for first, last in spans):
        return f"spans must be [first, last] with layers from 0 to {len(model.layers) - 1}"
    if len(set(layers)) < len(layers):
        return "spans overlap"
    for layer in layers:
        if model.layers[layer].attention is None:
            return f"spans: layer {layer} has no softmax attention"
        if source_of(model, layer, layers) is None:
            return f"spans: no layer before {layer} has a map of its own with the same heads, rope and window"
    return None


def can_be_shared(model: ModelSpec) -> list[int]:
    """The layers that a search may choose, the last ones first: any number of them fit together."""
    first, last = PROTECTED
    kinds = [layer.attention for layer in model.layers]
    inner = range(first, len(kinds) - last)
    return [index for index in reversed(inner) if kinds[index] is not None and kinds[index] in kinds[:index]]


def keys_of(model: ModelSpec, layers: Collection[int]) -> int:
    """Cached numbers per token that ``layers`` have for keys alone: half of theirs, or the rope key of a latent."""
    return sum(_keys(model.layers[index]) for index in layers)


def _keys(layer: LayerSpec) -> int:
    values = 0 if layer.attention is None else layer.attention.cached_numbers // 2
    if (latent := layer.latent) is None:
        return values
    return latent.qk_rope_head_dim + max(0, latent.kv_lora_rank - values)


def cached(model: ModelSpec) -> int:
    """Numbers per token in the cache of all layers."""
    latents = [layer.latent for layer in model.layers]
    stock = sum(spec.cached_numbers for index, spec in model.attention_layers.items() if latents[index] is None)
    return stock + sum(each.kv_lora_rank + each.qk_rope_head_dim for each in latents if each is not None)


def latest(model: ModelSpec, layers: int | None, kv_cache: float | None) -> list[int]:
    """The last layers that can be shared, as many as asked for: what a plan says before the search.

    Raises:
        InfeasibleError: not so many can be; the message says how many.
    """
    possible = can_be_shared(model)
    if layers is not None:
        if layers > len(possible):
            raise InfeasibleError(f"layers {layers}: at most {len(possible)} layers of this model can be shared")
        return possible[:layers]
    count = next((n for n in range(len(possible) + 1) if is_met(model, possible[:n], kv_cache)), None)
    if count is None:
        whole = sum(attention.cached_numbers for attention in model.attention_layers.values())
        least = (cached(model) - keys_of(model, possible)) / whole
        raise InfeasibleError(
            f"kv_cache {kv_cache:g} cannot be met, because only keys are shared: the smallest possible is "
            f"kv_cache {-(-least * 10000 // 1) / 10000:g}"
        )
    return possible[:count]


def is_met(model: ModelSpec, shared: Collection[int], kv_cache: float | None) -> bool:
    """Whether the cache without the keys of ``shared`` is at most this share of the original's."""
    whole = sum(attention.cached_numbers for attention in model.attention_layers.values())
    return kv_cache is None or cached(model) - keys_of(model, shared) <= kv_cache * whole + 1e-9

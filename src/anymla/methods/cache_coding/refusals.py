"""Which models can have a coded cache, from the config alone."""

from __future__ import annotations

from anymla.architectures.families import FAMILIES, OWN_CACHE
from anymla.modeling.spec import ModelSpec

BY_LENGTH = ("dynamic", "longrope")  # types of rope whose frequencies change with the length of the text


def coded_refusal(model: ModelSpec) -> str | None:
    """Why keys of ``model``, or its rope key, cannot be cached before rope, or None."""
    if any(layer.latent is not None and layer.latent.exact_window for layer in model.layers):
        return "its latent has an exact window, and a coded one has none: give the step mla exact_window 0"
    if any(layer.coded is not None and not layer.coded.low_rank for layer in model.layers):
        return "its cache is coded already"
    if (reason := _packed_refusal(model)) is not None:
        return reason
    if any(layer.shared is not None for layer in model.layers):
        return "its layers share attention maps: codes need keys in every layer"
    if any(layer.grouped is not None for layer in model.layers):
        return "its heads share keys after rope, or values: only stock attention, mla, mfa and lorc can have codes"
    if FAMILIES[model.text_model_type].all_layers_attend:
        return OWN_CACHE
    if (rope := model.rope) is None:
        return None
    if rope.rope_type in BY_LENGTH:
        return f"its rope is {rope.rope_type}: it changes with the length of the text, and keys are cached before rope"
    if model.has_vision and "mrope_section" in rope.settings:
        return "its rope has several axes, for images: keys are cached before rope, by their place in the text"
    return None


def _packed_refusal(model: ModelSpec) -> str | None:
    """Why codes would unpack weights of ``model``, or None."""
    if any(layer.packed is not None and layer.packed.attention and layer.latent is None for layer in model.layers):
        return (
            "the projections of its attention are packed, and codes would unpack them: give the step that packs them "
            "attention: false, or put mla before it"
        )
    if any(layer.zeros is not None for layer in model.layers):
        return "its packed weights have zero points, which codes would unpack: give the step that packs zeros: false"
    return None

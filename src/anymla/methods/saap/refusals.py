"""Which structures of a model can be removed, from the config alone."""

from __future__ import annotations

from anymla.architectures.families import FAMILIES, LAYERS_BY_MODEL, OUTPUT_NORM
from anymla.architectures.vision import TEXT_WIDTH_OUTSIDE
from anymla.modeling.spec import ModelSpec


def attention_refusal(model: ModelSpec) -> str | None:
    """Why no gradient tells what matters in ``model``, or None."""
    if any(layer.shared is not None for layer in model.layers):
        return (
            "its layers share attention maps, which a gradient does not pass layer by layer: put saap before that step"
        )
    if any(layer.width is not None for layer in model.layers):
        return "its layers have widths of their own already"
    if any(layer.coded is not None for layer in model.layers):
        return "its cache is coded, which no gradient passes: put saap before that step"
    return None


def own_width_refusal(model: ModelSpec) -> str | None:
    """Why no layer of ``model`` can have a width of its own, or None."""
    if model.text_model_type in LAYERS_BY_MODEL:
        return "its family makes all layers at once, in one width: allocation: uniform, without protected layers"
    return None


def neurons_refusal(model: ModelSpec) -> str | None:
    """Why FFN neurons of ``model`` cannot be removed, or None."""
    leave = "leave them (neurons: 1.0)"
    if model.experts:
        return f"neurons: its FFNs are mixtures of experts, whose neurons stay: {leave}, and remove experts"
    if not FAMILIES[model.text_model_type].fewer_neurons:
        return f"neurons: no config of its family says another width, or a norm reads all of them: {leave}"
    if model.model_type in TEXT_WIDTH_OUTSIDE:
        return f"neurons: what connects its vision tower is as wide as its FFNs, by the same field: {leave}"
    return None


def heads_refusal(model: ModelSpec) -> str | None:
    """Why KV groups of ``model`` cannot be removed, or None."""
    leave = "leave them (heads: 1.0)"
    family, specs = FAMILIES[model.text_model_type], [*model.attention_layers.values()]
    if model.rope is not None and model.rope.rope_type == "longrope":
        return f"heads: the length of its rope's factors is checked against hidden_size over heads: {leave}"
    if len({(each.num_heads, each.num_kv_heads) for each in specs}) > 1:
        return f"heads: its layers have different numbers of them: {leave}"
    if any(each.stored_numbers != each.cached_numbers for each in specs):
        return f"heads: transformers repeats its KV heads before it caches them: {leave}"
    if not family.says_kv_heads or family.fewer_heads == "none" or family.beyond == OUTPUT_NORM:
        return f"heads: no config of its family says fewer of the same size, or a norm reads all of them: {leave}"
    for layer in model.layers:
        if layer.kind is not None and layer.latent is None:
            return f"heads: its attention is neither stock nor a latent one: {leave}"
        if layer.latent is not None and (layer.latent.exact_window or not layer.parts[0].linear_keys):
            return f"heads: its latent is made of true keys of all heads: {leave}"
    return None


def latent_refusal(model: ModelSpec) -> str | None:
    """Why latent channels of ``model`` cannot be removed, or None."""
    leave = "leave them (latent: 1.0)"
    if not any(layer.latent is not None for layer in model.layers):
        return f"latent: it has no latent attention, which the step mla makes; saap then takes its checkpoint: {leave}"
    return None


def experts_refusal(model: ModelSpec) -> str | None:
    """Why experts of ``model`` cannot be removed, or None."""
    if model.routed_experts:
        return None
    return "experts: it has none that its router chooses one by one, by a number in its config: experts: 1.0"


REFUSALS = {"experts": experts_refusal, "neurons": neurons_refusal, "heads": heads_refusal, "latent": latent_refusal}
